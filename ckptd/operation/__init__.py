# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parts common to the operations of a worker: the request, the tree, deadlines, and the broker."""
