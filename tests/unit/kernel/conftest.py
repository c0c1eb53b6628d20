# SPDX-License-Identifier: LGPL-2.1-or-later
"""A child to look at."""

from tests.lib.forked import forked

__all__ = ['forked']
