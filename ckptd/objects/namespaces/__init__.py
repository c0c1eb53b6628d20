# SPDX-License-Identifier: LGPL-2.1-or-later
"""Namespaces, one file for each kind, for both directions: findings, record, creation. See base.py."""
