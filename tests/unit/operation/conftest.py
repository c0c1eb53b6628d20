# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures of the tests of operations."""

from tests.lib.forked import forked

__all__ = ['forked']
