# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unix sockets: their names, their connections, the messages in their queues, and peers outside of the tree."""
