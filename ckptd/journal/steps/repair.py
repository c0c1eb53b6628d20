# SPDX-License-Identifier: LGPL-2.1-or-later
"""The step that holds TCP sockets in repair mode (TCP_REPAIR) while their queues are read. Only root can do that."""

import socket
from collections.abc import Mapping
from contextlib import suppress

from ckptd.journal.steps.base import Moved, Step, StepContext
from ckptd.journal.steps.walks import HeldSocket, socket_of
from ckptd.kernel.tcp import TCP_REPAIR, leave_repair


class RepairSockets(Step, frozen=True):
    """TCP sockets that may be in repair mode, where a write by the program would do harm. Undo: end that mode."""
    point = 'repair'
    before_thaw = True
    holders: tuple[HeldSocket, ...]

    def describe(self) -> str:
        return f'reading the send queues of {len(self.holders)} sockets'

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        """Skip a process that has exited, or has closed its socket."""
        for holder in self.holders:
            with suppress(ProcessLookupError), socket_of(holder) as sock:
                if sock and sock.proto == socket.IPPROTO_TCP and sock.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR):
                    leave_repair(sock)
