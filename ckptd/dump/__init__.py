# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dump: from a frozen tree to the records and page data of an image."""
