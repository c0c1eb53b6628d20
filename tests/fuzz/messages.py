# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random calls to a daemon of root on a bus with the policy of a system bus, by several users at once.

Methods of the API and of the standard interfaces, with arguments of the right signature and of others, options that
there are and others, values at their extremes, fds or none, on objects that are there or not. One in fifty is bytes
that may be no message. Each is answered by a value or by an error; no answer and no line of the log tells of an
internal error. Afterwards the daemon answers, and has as many fds and processes as before.

Targets are processes of the users' own that sleep. Root asks about numbers that nobody has, and names no targets.
"""

import os
import pickle
import random
import select
import socket
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from ckptd.bus import header
from ckptd.bus.interfaces import documents
from ckptd.bus.names import BUS_NAME, IMAGE, JOB, MANAGER, ROOT, image_path, job_path
from ckptd.bus.options import CHECKPOINT, FREEZING, INHIBIT, RESTORE
from ckptd.bus.wire import Received, socket_names
from tests.bus.raw import CALL, ERROR, RETURN, message, pad, to_object
from tests.daemon.flooder import text, with_options
from tests.fuzz.looking import Report, dice_of
from tests.fuzz.marshal import SIGNATURES, Marshal, split
from tests.jobs.test_spool import write_image
from tests.lib import settled
from tests.lib.brood import fork
from tests.lib.bus import Served, family
from tests.lib.gate import own_cgroup
from tests.lib.systembus import USERS, SystemBus

PATIENCE = 60.0         # seconds for an answer, and for the daemon to be at rest again
WINDOW = 8              # calls of a client that wait for their answers
SLEEPERS = 4            # processes of each user
_NO_REPLY = 1
_PROPERTIES = 'org.freedesktop.DBus.Properties'
_STANDARD = {
    'org.freedesktop.DBus.Peer': {'Ping': '', 'GetMachineId': ''},
    'org.freedesktop.DBus.Introspectable': {'Introspect': ''},
    'org.freedesktop.DBus.ObjectManager': {'GetManagedObjects': ''},
    _PROPERTIES: {'Get': 'ss', 'GetAll': 's', 'Set': 'ssv'}}
# those that act on processes
_ACTING = {'Checkpoint', 'CheckpointProcess', 'CheckpointSelf', 'Freeze', 'Restore'}
_REMOVING = {'Remove', 'RemoveImage'}
# what the bus passes on
_TEXTS = ('', 'x', '..', '/', '/..', 'x' * 300, 'x' * 70_000, '\U0010ffff', 'pid:', 'pid:0', 'pid:-1',
          'pid:99999999999', f'pid:{1 << 64}', 'pid:1 ', 'pid:0x1', 'pid:١', 'cgroup:', 'cgroup:/..', 'cgroup:/no/such',
          'unit.service', '%s%n', 'self ', '20240131_235959_sleep_3fa9', '../../etc/passwd', MANAGER, JOB, IMAGE,
          'Jobs', 'Spool', 'core', 'tar')


class Methods(NamedTuple):
    """(interface, member): signature of its arguments."""
    found: Mapping[tuple[str, str], str]

    @classmethod
    def read(cls) -> 'Methods':
        found = {(interface, member): signature for interface, members in _STANDARD.items()
                 for member, signature in members.items()}
        for document in documents().values():
            [interface] = ElementTree.fromstring(document)
            for element in interface.findall('method'):
                found[interface.attrib['name'], element.attrib['name']] = ''.join(
                    arg.attrib['type'] for arg in element.findall('arg') if arg.get('direction') == 'in')
        return cls(found)


class Client:
    """A connection of this process's user."""

    def __init__(self, address: str) -> None:
        [path] = socket_names(address)
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(PATIENCE)
        self._sock.connect(path)
        uid = str(os.geteuid()).encode().hex().encode()
        self._sock.sendall(b'\0AUTH EXTERNAL %s\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n' % uid)
        line = b''
        while line.count(b'\r\n') < 2:
            line += self._sock.recv(1)
        self._in = b''
        self.serial = 0
        self.send(message(CALL, self.next(), to_object('org.freedesktop.DBus', '/org/freedesktop/DBus',
                                                       'org.freedesktop.DBus', 'Hello')), [])

    def next(self) -> int:
        self.serial += 1
        return self.serial

    def send(self, data: bytes, fds: Sequence[int]) -> None:
        sent = socket.send_fds(self._sock, [data], fds) if fds else 0
        self._sock.sendall(data[sent:])

    def receive(self) -> Received:
        """The next message. EOFError, TimeoutError."""
        fixed = self._exactly(16)
        fields, length = header.lengths(fixed)
        received = header.parse_header(fixed, self._exactly(fields))
        received.raw = self._exactly(length)
        return received

    def _exactly(self, count: int) -> bytes:
        while len(self._in) < count:
            data, fds, _, _ = socket.recv_fds(self._sock, 1 << 16, 16)
            for fd in fds:
                os.close(fd)
            if not data:
                raise EOFError
            self._in += data
        data, self._in = self._in[:count], self._in[count:]
        return data

    def close(self) -> None:
        self._sock.close()


class Sender:
    """Sends the calls of some numbers, and looks at every answer."""

    def __init__(self, address: str, seed: int, targets: Sequence[str], images: Sequence[str]) -> None:
        self._address, self._seed, self._methods = address, seed, Methods.read().found
        self._targets, self._images = targets, images
        self.counts: Counter[str] = Counter()
        self.findings: list[str] = []

    def run(self, numbers: Sequence[int]) -> None:
        client, waiting = Client(self._address), {}
        for number in numbers:
            dice = dice_of(self._seed, number)
            try:
                if (call := self._send(client, dice)) is not None:
                    waiting[call[0]] = (number, call[1])
                while len(waiting) >= WINDOW:
                    self._answer(client.receive(), waiting)
            except (EOFError, ConnectionError):     # the bus hangs up on those who send no messages
                self.counts['hung up'] += 1
                client.close()
                client, waiting = Client(self._address), {}
            except TimeoutError:
                self.findings.append(f'no answer to any of {waiting}')
                return
        while waiting:
            try:
                self._answer(client.receive(), waiting)
            except (EOFError, ConnectionError):
                break
            except TimeoutError:
                self.findings.append(f'no answer to any of {waiting}')
                break
        client.close()

    def _answer(self, received: Received, waiting: dict[int, tuple[int, str]]) -> None:
        number, what = waiting.pop(received.reply_serial, (0, ''))
        if not what:
            return          # a signal, or Hello
        self.counts[received.error_name.rpartition('.')[2] if received.type == ERROR else 'answer'] += 1
        if received.type not in (RETURN, ERROR) or b'nternal error' in received.raw or b'Traceback' in received.raw:
            self.findings.append(f'call {number} of seed {self._seed}, {what}: {received.raw[:300]!r}')

    # ------------------------------------------------------------ one call

    def _send(self, client: Client, dice: random.Random) -> tuple[int, str] | None:
        """Serial and words of a call that is answered."""
        interface, member = dice.choice(list(self._methods))
        if member in _REMOVING and dice.random() < 0.95:        # or soon nothing is left to ask about
            interface, member = dice.choice(list(self._methods))
        signature = self._methods[interface, member]
        if not os.geteuid() and member in _ACTING:
            signature = 'u'         # of root's never the right one
        elif dice.random() < 0.3:
            signature = self._other_signature(signature, dice)
        fds = self._fds(dice) if 'h' in signature or dice.random() < 0.02 else []
        try:
            body = Marshal(dice, self._texts(member, dice), self._options(member, dice))
            for index, kind in enumerate(split(signature)):
                body.add(kind, 0 if kind == 'h' and dice.random() < 0.8 else self._argument(member, index, kind, dice))
            path = self._path(interface, dice)
            fields = to_object(BUS_NAME, path, dice.choice((interface,) * 49 + ('x.y',)), member, signature)
            if fds:
                fields.append((9, 'u', len(fds)))
            serial, flags = client.next(), dice.choice((0,) * 9 + (_NO_REPLY,))
            data = message(CALL, serial, fields, bytes(body.data), flags)
            if dice.random() < 0.02:
                flags = _NO_REPLY
                self._send_garbled(_garbled(data, dice), fds)
            else:
                client.send(data, fds)
        finally:
            for fd in fds:
                os.close(fd)
        self.counts['sent'] += 1
        return None if flags & _NO_REPLY else (serial, f'{interface}.{member}({signature}) of {path}')

    def _send_garbled(self, data: bytes, fds: Sequence[int]) -> None:
        """By a connection of its own: the bus may hang up, or take it for another message."""
        client = Client(self._address)
        with suppress(ConnectionError):
            client.send(data, fds)
        client.close()

    def _path(self, interface: str, dice: random.Random) -> str:
        """An object that has the interface, mostly."""
        images = [image_path(image) for image in self._images]
        others = [ROOT, job_path(dice.choice((0, 1, 1 << 40))), '/', '/org', f'{ROOT}/x', *images]
        fitting = {IMAGE: images, JOB: [job_path(dice.randrange(200))]}.get(interface, [ROOT])
        return dice.choice(fitting if fitting and dice.random() < 0.85 else others)

    def _argument(self, member: str, index: int, kind: str, dice: random.Random) -> object:
        """What means something at that place, mostly."""
        if index or kind != 's' or dice.random() < 0.3:
            return None
        if 'mage' in member or 'Restore' in member:
            return dice.choice(self._images) if self._images else None
        return dice.choice(self._targets) if self._targets else None

    def _texts(self, member: str, dice: random.Random) -> Sequence[str]:
        return _TEXTS if dice.random() < 0.9 else (*self._targets, *_TEXTS[:5])

    @staticmethod
    def _other_signature(signature: str, dice: random.Random) -> str:
        kinds = split(signature)
        match dice.randrange(4):
            case 0:
                kinds = kinds[:-1]
            case 1:
                kinds.append(dice.choice(('s', 'a{sv}', 'u', 'h')))
            case 2:
                kinds = [dice.choice(SIGNATURES) for _ in kinds or 'x']
            case _:
                dice.shuffle(kinds)
        return ''.join(kinds)

    @staticmethod
    def _options(member: str, dice: random.Random) -> Mapping[str, Callable[[], tuple[str, object]]]:
        """Options that there are, each with a value of a type that some option has."""
        numbers = (0, 1, 1000, 2_000_000, 1 << 31, (1 << 63) - 1, (1 << 64) - 1)
        words = ('auto', 'cgroup', 'ptrace', 'caller', 'resume', 'kill', 'accept', 'rollback', 'token', '/x', '')

        def value() -> tuple[str, object]:
            kind = dice.choice('stbusth')
            return kind, {'s': dice.choice(words), 'b': dice.getrandbits(1), 'h': 0}.get(kind, dice.choice(numbers))
        return {option.name: value for option in {*CHECKPOINT, *FREEZING, *RESTORE, *INHIBIT}}

    @staticmethod
    def _fds(dice: random.Random) -> list[int]:
        found = []
        for _ in range(dice.choice((0, 1, 1, 1, 1, 2, 8))):
            match dice.randrange(4):
                case 0:
                    found.append(os.open('/dev/null', os.O_RDWR))
                case 1:
                    found.append(os.memfd_create('fuzz'))
                    os.write(found[-1], dice.randbytes(2000))
                    os.lseek(found[-1], 0, os.SEEK_SET)
                case 2:
                    read, write = os.pipe()
                    found.append(dice.choice((read, write)))
                    os.close(read + write - found[-1])
                case _:
                    found.append(os.open('/', os.O_RDONLY))
        return found


def _garbled(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8))):
        changed[dice.randrange(16, len(changed))] = dice.choice((0, 1, 0xFF, dice.randrange(256)))
    return bytes(changed)


# ---------------------------------------------------------------- the run

def flood(count: int, seed: int) -> Report:
    """Send so many messages to a daemon of its own."""
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='ckptd-fuzz-')))
        base.chmod(0o711)
        bus = stack.enter_context(SystemBus(base))
        (base / 'spool').mkdir(mode=0o700)
        daemon = stack.enter_context(Served(bus.address, base, base / 'spool'))
        group = _cgroup(stack)
        users = {name: _sleepers(uid, group, stack) for name, uid in USERS.items()}
        images = [write_image(base / 'spool', uid) for uid in USERS.values()]
        before = _rest(daemon)
        report = _send_all(daemon, users, images, group, range(count), seed)
        return Report(report.counts, [*report.findings, *_afterwards(daemon, before)])


def _cgroup(stack: ExitStack) -> Path | None:
    """Of the clients and all that they restore, which is killed."""
    own = own_cgroup()
    if own is None:
        return None
    group = own / f'fuzz-messages-{os.getpid()}'
    group.mkdir()
    stack.callback(settled.remove_cgroup, group)
    return group


def _enter(group: Path | None) -> None:
    if group is not None:
        (group / 'cgroup.procs').write_text('0')


def _sleepers(uid: int, group: Path | None, stack: ExitStack) -> list[int]:
    found = []
    for _ in range(SLEEPERS):
        process = subprocess.Popen(['/bin/sleep', '100000'], cwd='/', user=uid, group=uid, extra_groups=[],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        if group is not None:
            (group / 'cgroup.procs').write_text(str(process.pid))
        stack.callback(process.wait)
        stack.callback(process.kill)
        found.append(process.pid)
    return found


def _send_all(daemon: Served, users: Mapping[str, list[int]], images: Sequence[str], group: Path | None, numbers: range,
              seed: int) -> Report:
    """By a process of each user, and one of root."""
    everybody = [f'pid:{pid}' for pids in users.values() for pid in pids]
    senders = [*USERS.values(), 0]
    running = []
    for nth, uid in enumerate(senders):
        sender = Sender(daemon.address, seed, everybody if uid else [],
                        [*images, *[images[nth]] * 8] if uid else images)
        running.append(_begin(uid, group, sender, numbers[nth::len(senders)]))
    counts: Counter[str] = Counter()
    findings: list[str] = []
    for pid, reader in running:
        with os.fdopen(reader, 'rb') as pipe:
            data = pipe.read()
        _, status = os.waitpid(pid, 0)
        if status or not data:
            findings.append(f'a client ended with {status:#x}')
            continue
        counts.update(pickle.loads(data)[0])
        findings += pickle.loads(data)[1]
    return Report(counts, findings)


def _begin(uid: int, group: Path | None, sender: Sender, numbers: Sequence[int]) -> tuple[int, int]:
    reader, writer = os.pipe()
    pid = fork()
    if pid:
        os.close(writer)
        return pid, reader
    try:
        os.close(reader)
        _enter(group)
        if uid:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        sender.run(numbers)
        with os.fdopen(writer, 'wb') as pipe:
            pipe.write(pickle.dumps((sender.counts, sender.findings)))
        os._exit(0)
    finally:
        os._exit(1)


class _Rest(NamedTuple):
    fds: int
    processes: int


def _rest(daemon: Served) -> _Rest:
    return _Rest(len(os.listdir(f'/proc/{daemon.pid}/fd')), len(family(daemon.pid)))  # noqa: PTH208


def _afterwards(daemon: Served, before: _Rest) -> Iterator[str]:
    """What is not as it was, as soon as it can be; and what the log says."""
    client = Client(daemon.address)
    for _, path, *_ in _ask(client, ROOT, MANAGER, 'ListJobs').body()[0]:
        _ask(client, path, JOB, 'Cancel', 'a{sv}', bytes(8))
    # what is to stay frozen when whoever asked is gone, as they said
    arguments = pad(text(MANAGER), 4) + text('FrozenTargets')
    for target in _ask(client, ROOT, _PROPERTIES, 'Get', 'ss', arguments).body()[0]:
        _ask(client, ROOT, MANAGER, 'Thaw', 'sa{sv}', with_options(target))
    deadline = time.monotonic() + PATIENCE
    while _busy(daemon, before) and time.monotonic() < deadline:
        select.select([], [], [], 0.05)     # workers end, pidfds of callers are closed as the bus tells of their end
    yield from _busy(daemon, before)
    for line in daemon.log.splitlines():
        if 'Traceback' in line or 'internal error' in line:
            yield f'the log: {line}\n{daemon.log[daemon.log.index(line):][:3000]}'
            break
    last = _ask(client, ROOT, MANAGER, 'ListJobs')
    client.close()
    if last.type != RETURN:
        yield f'ListJobs is answered by {last.error_name}'


def _ask(client: Client, path: str, interface: str, member: str, signature: str = '', body: bytes = b'') -> Received:
    serial = client.next()
    client.send(message(CALL, serial, to_object(BUS_NAME, path, interface, member, signature), body), [])
    while (received := client.receive()).reply_serial != serial:
        continue
    return received


def _busy(daemon: Served, before: _Rest) -> list[str]:
    now = _rest(daemon)
    found = [f'the daemon has {now.fds} fds, {before.fds} before'] if now.fds > before.fds + 1 else []
    found += [f'{now.processes} processes, {before.processes} before'] if now.processes > before.processes else []
    found += [f'{path} was left' for path in daemon.spool.iterdir() if path.name.startswith('.incoming')]
    with suppress(FileNotFoundError):
        found += [f'{path} was left' for path in (daemon.runtime / 'freezes').glob('*.jsonl')]
    return found
