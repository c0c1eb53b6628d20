# SPDX-License-Identifier: LGPL-2.1-or-later
"""Inspection of a live tree: scan, a cache of /proc, and the checks that tell why it cannot be dumped."""
