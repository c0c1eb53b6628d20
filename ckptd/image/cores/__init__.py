# SPDX-License-Identifier: LGPL-2.1-or-later
"""Cores: an image as ELF core files, for debuggers."""
