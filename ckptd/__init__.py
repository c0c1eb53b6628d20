# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptd checkpoints and restarts trees of Linux processes, over D-Bus."""

__version__ = '0.1.0'
