# SPDX-License-Identifier: LGPL-2.1-or-later
"""Findings about TCP connections: their state, and those to peers outside of the tree."""

import os
import socket
from collections.abc import Iterator

from ckptd.errors import Finding
from ckptd.external import Action
from ckptd.kernel import inet, unix
from ckptd.kernel.inet import STATES, Address, local_address, peer_address, tcp_state
from ckptd.objects.files.base import OpenFile, finding
from ckptd.objects.files.inet.zerocopy import zerocopy_findings
from ckptd.objects.files.inherited import asked_for
from ckptd.objects.files.tcp.keep import PATIENCE
from ckptd.objects.files.tcp.table import plain

_SUPPORTED = (inet.TCP_ESTABLISHED, inet.TCP_CLOSE_WAIT, inet.TCP_CLOSE, *inet.HAVE_SENT_FIN)
_HINT = 'close it before the checkpoint, or checkpoint a tree that has both ends'


def connection_findings(file: OpenFile, sock: socket.socket) -> Iterator[Finding]:
    """Yield the reasons why a connection cannot be dumped, wherever its other end is."""
    state, peer = tcp_state(sock).state, peer_address(sock)
    zerocopy = list(zerocopy_findings(file, sock))
    yield from zerocopy
    if unix.has_error(sock):
        if zerocopy:
            return
        yield finding('EIO', f'{file.link} is a TCP connection with a pending error, which reading would consume',
                      'let the program read it (SO_ERROR) before the checkpoint')
    elif state not in _SUPPORTED:
        yield finding('EAGAIN' if state == inet.TCP_SYN_SENT else 'EOPNOTSUPP', f'{file.link} is a TCP connection to '
                      f'{peer} ({STATES.get(state, "unknown")})', 'try again when it is established')
    elif peer and plain(peer) == plain(local_address(sock)):
        yield finding('EOPNOTSUPP', f'{file.link} is a TCP connection to itself', _HINT)


def outside_finding(file: OpenFile, peer: Address, holder: unix.Holder | None, action: Action, what: str) -> Finding:
    """Return the row about a connection to the outside. holder: a process that has the other end. action: of the policy
    for the peer. what: the name of the peer in policies."""
    where = f' ({holder.comm}[{holder.pid}])' if holder else ''
    reason = f'{file.link} is a TCP connection to {peer}{where}, outside of the tree'
    match action:
        case 'close':
            return finding('ECONNRESET', reason, 'after a restart its peer has reset it', 'warning')
        case 'keep' if os.geteuid():
            return finding('EPERM', reason, 'only root may keep it: checkpoint as root, with --as-root, or use close')
        case 'keep':
            return finding('ECONNRESET', reason, f'after --kill, a restart within {PATIENCE // 60} minutes goes on '
                           'with it; to any other one its peer has reset it', 'warning')
        case 'inherit':
            return finding('ECONNRESET', reason, asked_for(what), 'warning')
    return finding('EOPNOTSUPP', reason, 'checkpoint a tree that has both ends, or say what a restart does: '
                   f'--external={what}:close or, as root, --external={what}:keep')


def kept_finding(link: str) -> Finding:
    """Return the row about a connection with which the restart cannot go on any more."""
    return finding('ECONNRESET', f'{link} was kept for {PATIENCE // 60} minutes, until the next boot, and for root',
                   'its peer has reset it', 'warning')
