# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a frozen tree to the records and page data of an image."""
