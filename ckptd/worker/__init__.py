# SPDX-License-Identifier: LGPL-2.1-or-later
"""Worker processes: one job each, started by a spawner so that the daemon never forks."""
