# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory mappings, one file for each kind, for both directions: findings, dump, restore. See base.py."""
