# SPDX-License-Identifier: LGPL-2.1-or-later
"""The worker process: one job, one tree, one tracing thread. For a job of an ordinary user it becomes the broker of a
worker that is that user (worker/broker). It is forked by spawner.py, or started by systemd as

    python -m ckptd.worker.main FD        FD: its end of a SOCK_SEQPACKET socketpair, see messages.py
"""

import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from ckptd.errors import Cancelled, CkptError, ImageDamaged
from ckptd.image.ids import is_image_id
from ckptd.image.manifest import Manifest, read_manifest
from ckptd.objects.namespaces.birth import offsets_for
from ckptd.operation.context import JobContext, TooConfined
from ckptd.operation.watchdog import feeding
from ckptd.protocol.channel import Channel
from ckptd.protocol.messages import MAX_SENTENCE, Confined, Failed, Log, cut
from ckptd.protocol.requests import DumpRequest, Request, RestartRequest, RestoreRequest
from ckptd.worker.broker.identity import Identity, identity_of, identity_of_owner
from ckptd.worker.broker.process import Broker
from ckptd.worker.operations import operate

log = logging.getLogger('ckptd.worker')


class _ToDaemon(logging.Handler):
    """A log handler that sends the worker's log lines to the daemon's log."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._channel.send(Log(record.levelno, cut(self.format(record), MAX_SENTENCE)))
        except Cancelled:
            return          # no process is left to read it


def _set_up_signals(channel: Channel) -> None:
    # SIGCHLD is waited for (Tracee.wait with a deadline), never handled
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    # Ctrl-C in a terminal reaches the whole process group; the client turns it into Cancel
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def on_term(number: int, frame: FrameType | None) -> None:
        channel.cancel()

    signal.signal(signal.SIGTERM, on_term)


def _error_of(error: BaseException, phase: str) -> CkptError:
    """Make the error that the daemon gets. Errors of the system keep their errno; any other is a bug, and logged."""
    if isinstance(error, CkptError):
        if not error.phase:
            error.phase = phase
        return error
    if isinstance(error, OSError):
        log.debug('in phase %s', phase, exc_info=error)
        return CkptError(str(error), errno=error.errno, phase=phase,
                         hint='the daemon log shows more with CKPTD_DEBUG=ckptd.worker')
    log.error('internal error in phase %s', phase, exc_info=error)
    return CkptError('internal error', phase=phase, hint='this is a bug of ckptd: see the daemon log')


def run(channel: Channel) -> int:
    """Wait for the job and do it. Return the exit status."""
    got = channel.wait_start()
    if got is None:
        return 0
    start, fds = got
    try:
        manifest = _manifest(start.request)
        fd = fds[0] if fds else -1
        with feeding(start.request):
            if (identity := _identity(start.request, channel, fd, manifest)) is not None:
                clocks = offsets_for(manifest) if manifest and isinstance(start.request, RestoreRequest) else None
                return Broker(channel, start.request, fds, identity).run(main, clocks)
            operate(start.request, channel, fds)
    except TooConfined:
        channel.send(Confined())
    except Exception as error:  # noqa: BLE001 - the boundary of the process: every failure becomes a message
        failure = _error_of(error, channel.phase_name)
        try:
            channel.send(Failed.of(failure))
        except Cancelled:
            return 1
        return failure.exit_status
    finally:
        for fd in fds:
            os.close(fd)
    return 0


def _manifest(request: Request) -> Manifest | None:
    """Read the manifest of a restart, which names the owner of the image and the clocks of the tree."""
    if os.geteuid() != 0 or not isinstance(request, RestartRequest) or not is_image_id(request.image):
        return None
    try:
        return read_manifest(Path(request.spool) / request.image)
    except ImageDamaged:
        return None     # the operation reports all damages


def _identity(request: Request, channel: Channel, fd: int, manifest: Manifest | None) -> Identity | None:
    """Return the identity of the worker; None if this process does the job itself."""
    if os.geteuid() or request.caller.uid or not isinstance(request, DumpRequest):
        return identity_of(request, manifest)
    if request.as_root:
        return None
    channel.phase('resolve')
    return identity_of_owner(JobContext(request, channel, fd).resolve().roots, request)


def main(fd: int) -> int:
    channel = Channel(fd)
    _set_up_signals(channel)
    logging.basicConfig(level=os.environ.get('CKPTD_LOG_LEVEL', 'INFO'), handlers=[_ToDaemon(channel)],
                        format='%(message)s', force=True)
    try:
        return run(channel)
    finally:
        channel.close()


if __name__ == '__main__':
    sys.exit(main(int(sys.argv[1])))
