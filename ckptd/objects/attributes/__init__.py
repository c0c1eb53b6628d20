# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attributes of tasks, one file each, for both directions: ask, dump, findings, restore. See base.py."""
