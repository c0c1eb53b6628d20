# SPDX-License-Identifier: LGPL-2.1-or-later
"""TCP sockets: listeners and unconnected ones, connections in the tree, connections to the outside, and kept ones."""
