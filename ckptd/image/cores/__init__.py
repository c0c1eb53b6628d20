# SPDX-License-Identifier: LGPL-2.1-or-later
"""Export of an image as ELF core files for debuggers."""
