# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernel objects of a tree: one file for each kind of object, for both dump and restart."""
