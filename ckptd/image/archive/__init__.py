# SPDX-License-Identifier: LGPL-2.1-or-later
"""Archives: an image as a tar stream, out of the spool and into it."""
