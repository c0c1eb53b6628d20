# SPDX-License-Identifier: LGPL-2.1-or-later
"""Socket options and control messages that the module socket lacks, from <asm-generic/socket.h>."""

SO_GET_FILTER = 26                  # SO_ATTACH_FILTER, for getsockopt(2)
SO_TIMESTAMP, SO_TIMESTAMPNS = 29, 35
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
SO_RXQ_OVFL = 40
SO_PEEK_OFF = 42
SO_NOFCS = 43
SO_SELECT_ERR_QUEUE = 45
SO_BUSY_POLL = 46
SO_PEERGROUPS = 59
SO_BUF_LOCK = 72                    # since 5.15
SO_RCVMARK = 75                     # since 6.0
SO_PASSPIDFD = 76                   # since 6.5
SO_PASSRIGHTS = 83                  # since 6.16
SO_INQ = 84                         # since 6.17
