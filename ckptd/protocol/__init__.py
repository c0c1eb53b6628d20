# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages between the daemon, a worker and its broker, and the socket that carries them."""
