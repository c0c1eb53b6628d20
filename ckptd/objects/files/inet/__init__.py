# SPDX-License-Identifier: LGPL-2.1-or-later
"""Internet sockets: what all of them have in common, UDP, and raw sockets."""
