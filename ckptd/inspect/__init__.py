# SPDX-License-Identifier: LGPL-2.1-or-later
"""A picture of a live tree: scan, a cache of /proc, and the checks that say why it cannot be dumped."""
