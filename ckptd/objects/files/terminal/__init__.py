# SPDX-License-Identifier: LGPL-2.1-or-later
"""Terminals: the state that one terminal has, and its open files."""
