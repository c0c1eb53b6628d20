# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every operation of a worker has: its request, its tree, deadlines, and the broker."""
