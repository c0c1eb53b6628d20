# SPDX-License-Identifier: LGPL-2.1-or-later
"""System V objects that belong to an image by name (checkpoint --sysv): one file for each type."""
