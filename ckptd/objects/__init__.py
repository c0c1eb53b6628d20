# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel keeps of a tree: one file for each kind of object, both directions."""
