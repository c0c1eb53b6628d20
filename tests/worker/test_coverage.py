# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an image has, a restart reads: every field of every record, noted while victims are restored.

A field that the restart proper does not read is in one of two tables, with the reason; both are exact.
"""

import json
import os
import pty
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from ckptd.image import grammar
from ckptd.image import records as r
from ckptd.kernel.prctl import PR_FUTEX_HASH, PR_FUTEX_HASH_GET_SLOTS, prctl
from ckptd.objects.attributes.registry import ATTRIBUTES
from ckptd.objects.files.registry import BY_TAG
from ckptd.worker import main as worker_module
from tests.lib import settled
from tests.lib.brood import fork
from tests.lib.shown import has_speculation_controls
from tests.lib.victim import Victim
from tests.worker.driver import DirectWorker, Place
from tests.worker.test_namespaces import other_boot

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]

# digests, and the look at whether records fit together, are no restart
_NOT_READING = ('ckptd.image.verify', 'ckptd.image.references', 'ckptd.image.shapes', 'ckptd.objects.files.sound')
_CHECKS = 'ckptd.restore.checks'


def has_futex_hash() -> bool:
    try:
        return prctl(PR_FUTEX_HASH, PR_FUTEX_HASH_GET_SLOTS) >= 0
    except OSError:
        return False


# read before there is a process, to refuse or to warn, and by nothing that comes after
_OF_SHARED_MEMORY = 'the SharedMemory record of its shm_id has that; every dump makes one'
CHECKED = {
    'Backing.mtime': 'a mapped file is opened as it is',
    'Directory.inode': 'a directory is opened by its name',
    'Fanotify.unread': 'for a warning; events cannot be put back',
    'Header.machine': 'of this kind of processor, or refused',
    'Header.page_size': 'the same, or refused',
    'InotifyInstance.unread': 'for a warning; events cannot be put back',
    'Keyrings.mask': 'for a warning; nobody else can read the keys',
    **{f'Memfd.{name}': _OF_SHARED_MEMORY for name in ('content', 'gid', 'mode', 'seals', 'uid')},
    'Namespace.inode': 'whether it is ours, in the same boot',
    'Namespaces.holders': 'the same, without ids',
    'Namespaces.ids': 'the same',
    **{f'PathReference.{name}': 'of a node that is made again; another owner is a refusal' for name in ('gid', 'uid')},
    'Pty.name': 'whether another terminal has the number',
    'Registers.machine': 'of this kind of processor, or refused',
    'SavedMark.inode': 'of a marked file; another one is a refusal',
    'Tty.path': 'whether it is within reach; the terminal is the caller\'s'}
_THERE = 'what is there is opened as it is'
UNREAD = {
    **{f'KeptConnection.{name}': 'of a connection to the outside, see tests/worker/test_tcp_keep.py' for name in (
        'advertised', 'boot', 'mss', 'options', 'receive_scale', 'received', 'send_scale', 'sent', 'state', 'table',
        'timestamp', 'unacknowledged', 'unread', 'until', 'window')},
    **{f'InheritedFile.{name}': 'of a connection to the outside, see tests/worker/test_inherited.py' for name in (
        'what', 'family', 'type', 'protocol')},
    **{f'SystemVObject.{name}': 'of an object that is named, see tests/worker/test_system_v.py' for name in (
        'number', 'type', 'id', 'data')},
    **{f'DeadProcessFile.{name}': 'see tests/worker/test_dead_processes.py' for name in ('mode', 'path')},
    'Credentials.keepcaps': 'is a bit of securebits',
    'Directory.device': _THERE,
    'Fifo.mode': 'OpenFile.mode is the same',
    'Fifo.packet_mode': 'is O_DIRECT of OpenFile.flags',
    'Header.processes': 'for people; the tasks are counted',
    'Header.realtime': 'for people; the time of day goes on',
    'Header.root': 'the first of the tasks',
    'Header.tasks': 'for people; the tasks are counted',
    'Memfd.size': _OF_SHARED_MEMORY,
    **{f'NamespaceHolder.{name}': 'on kernels without ids; see test_own_namespaces' for name in ('pid', 'start_time')},
    'Pipe.packet_mode': 'is O_DIRECT of OpenFile.flags',
    'PosixTimer.overrun': 'NOT RESTORED: no call sets the count of a timer',
    'Regular.links': 'for people; names are not made again',
    'SleepLeft.clock': 'for people; left_ns was counted by it',
    'SleepLeft.exact': 'for people',
    'TaskRecord.pf_flags': 'for core files; each is made again by what it tells of',
    'UnixSocketEnd.identifier': 'of a connection to the journal, see tests/worker/test_unix_outside.py',
    **({} if 'amx_tile' in Path('/proc/cpuinfo').read_text() else {'Permissions.components': 'needs AMX'}),
    **({} if has_futex_hash() else {'FutexHash.slots': 'needs Linux 6.17'})}
# together they have every field that any victim has
SUBJECTS = ('attributes', 'epolls', 'events', 'fanotify', 'files', 'inet_options', 'inet_sockets', 'inotify',
            'interpreter', 'io_urings', 'linked', 'locks', 'memory', 'mqueues', 'namespace_files', 'netlink', 'opath',
            'packet_sockets', 'pidfds', 'removed', 'seccomp', 'settings', 'shared', 'signals', 'socket_filters',
            'stopped', 'tcp_connections', 'terminals', 'terminals unread', 'tiles', 'timers', 'tree', 'unix_names',
            'unix_sockets')


def classes() -> list[type]:
    """Records, and the groups of fields in them and in those of kinds and attributes."""
    modules = {r.__name__, *(kind.__module__ for kind in BY_TAG.values()), 'ckptd.objects.files.content',
               'ckptd.objects.files.locks', 'ckptd.objects.files.socket_filter', 'ckptd.objects.files.terminal.state',
               'ckptd.objects.files.unix.messages', 'ckptd.objects.files.unix.names', 'ckptd.objects.files.unix.record',
               'ckptd.objects.files.inet.socket', 'ckptd.objects.files.inet.options', 'ckptd.objects.files.tcp.keep',
               'ckptd.objects.files.tcp.agreement',
               'ckptd.objects.files.tcp.record',
               *(type(one).__module__ for one in ATTRIBUTES)}
    todo: list[type[Any]] = list(grammar.Struct.__subclasses__())
    found = []
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if cls.__module__ in modules and '_codec' in vars(cls):
            found.append(cls)
    return found


class Noted:
    """A field that says who read it: in place of the slot's own descriptor."""

    def __init__(self, slot: Any, name: str, seen: set[tuple[str, str]]) -> None:
        self._slot, self._name, self._seen = slot, name, seen

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        reader = sys._getframe(1)
        module, function = reader.f_globals['__name__'], reader.f_code.co_name
        # nor is what a dataclass does by itself: __eq__, __repr__
        if not module.startswith(_NOT_READING) and not function.startswith('__'):
            # the views of the reader are the same for all who look
            checking = module != 'ckptd.image.reader' and _in_check(reader)
            self._seen.add((self._name, 'check' if checking else 'restart'))
        return self._slot.__get__(instance, owner)

    def __set__(self, instance: object, value: object) -> None:
        self._slot.__set__(instance, value)


def _in_check(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals['__name__'].startswith(_CHECKS):
            return True
        frame = frame.f_back
    return False


class NotingWorker(DirectWorker):
    """A forked worker that notes what it reads: a JSON list of (class.field, 'check' or 'restart')."""

    def __init__(self, notes: Path) -> None:
        super().__init__(forked=True)
        self._notes = notes

    def _fork(self, theirs: socket.socket) -> int:
        pid = fork()
        if pid == 0:
            try:
                self._socket.close()
                os.setsid()
                seen: set[tuple[str, str]] = set()
                for cls in classes():
                    for field in cls._codec.fields:
                        setattr(cls, field.name, Noted(vars(cls)[field.name], f'{cls.__name__}.{field.name}', seen))
                worker_module.main(theirs.detach())
                self._notes.write_text(json.dumps(sorted(seen)))
            finally:
                os._exit(0)
        return pid


class Reading:
    """Restores and what they have read. fields: by name, 'restart' or 'check'."""

    def __init__(self, directory: Path) -> None:
        self.place = Place(directory).make()
        self.fields: dict[str, str] = {}
        self._notes = directory / 'notes'

    def restore(self, image: Path, fds: tuple[int, ...] = (), **more: object) -> int:
        """The pid of its root."""
        settled.reap_orphans()
        with NotingWorker(self._notes) as worker:
            result = worker.run(self.place.request(0, operation='restore', image=image.name, **more), fds)
        for name, how in json.loads(self._notes.read_text()):
            if self.fields.get(name) != 'restart':
                self.fields[name] = how
        return int(result['root'])

    def kill(self, running: Victim, **more: object) -> Path:
        image = self.place.checkpoint(running.pid, after='kill', **more)
        running.process.wait()
        return image

    def restore_one_on_a_terminal(self) -> None:
        """It has the terminal as its controlling one, and is in the foreground."""
        pid, master = pty.fork()
        if pid == 0:
            os.execvp('sleep', ['sleep', '1000'])
        while Path(f'/proc/{pid}/comm').read_text() != 'sleep\n':
            os.sched_yield()
        image = self.place.checkpoint(pid, after='kill')
        os.waitpid(pid, 0)
        os.close(master)
        master, terminal = pty.openpty()
        try:
            root = self.restore(image, (terminal,))
            assert os.tcgetpgrp(master) == root
            os.kill(root, signal.SIGKILL)
            os.waitpid(root, 0)
        finally:
            os.close(master)
            os.close(terminal)


@pytest.mark.needs('time-namespaces')
def test_every_field_is_read(tmp_path: Path, victim: Callable[..., Victim]) -> None:
    reading = Reading(tmp_path)
    for name in SUBJECTS:
        running = victim(*name.split())
        image = reading.kill(running, save_files=True)
        if name == 'memory':
            other_boot(image)
        if name == 'files':
            with (running.directory / 'log').open('a') as log:
                log.write('after the checkpoint\n')
        root = reading.restore(image, changed_files='rollback')
        running.go()
        assert os.waitpid(root, 0) == (root, 0), running.output
    reading.restore_one_on_a_terminal()
    every = {f'{cls.__name__}.{field.name}' for cls in classes() for field in cls._codec.fields}
    assert {name for name, how in reading.fields.items() if how == 'check'} == CHECKED.keys()
    unknown = set() if has_speculation_controls() else {'Controls.states'}
    assert every - reading.fields.keys() == UNREAD.keys() | unknown
