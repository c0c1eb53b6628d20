# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client that sends what it likes: python -m tests.daemon.fuzzer ADDRESS SEED LIMIT UID VICTIM

LIMIT is a time, '10s', or a number of messages. It runs as UID, and never names a process but VICTIM, a unit or a
cgroup: a string is a target that is none, or begins with '~'. What it says at the end is one JSON object, see `Tally`.
With one seed and one daemon the messages are the same; how those of several connections mix is not.
"""

import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import struct
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from ckptd.bus import wire
from ckptd.bus.message import ALLOW_INTERACTIVE, NO_REPLY_EXPECTED, MessageType
from ckptd.bus.names import BUS_NAME, IMAGE, JOB, MANAGER, ROOT
from ckptd.bus.options import CHECKPOINT, FREEZING, INHIBIT, RESTORE
from ckptd.bus.wire import MAX_BODY, SignatureType, Variant, parse_signature
from ckptd.errors import ERROR_PREFIX
from tests.bus.raw import DESTINATION, MEMBER, PATH, SIGNAL, Field, Raw, message, to_object
from tests.bus.raw import INTERFACE as INTERFACE_FIELD

CONNECTIONS = 4
ANSWER = 30.0               # seconds for an answer; with none by then the daemon hangs
RENEW = 200                 # messages of a connection
LOOK = 1.0                  # seconds from one look at the objects to the next
TARGETED = frozenset({'Checkpoint', 'Check', 'Scan', 'Freeze', 'Thaw'})
TYPES = 'ybnqiuxtdsogv'
SIGNATURES = ('', 's', 'u', 'h', 'a{sv}', 'as', '(su)', 'aa{sv}', 'v', 'ay', 'a(ii)', 'sa{sv}', 'ssv', 'hsa{sv}',
              'tttt', 'a{s(uv)}', 'aav', 'gggg')
NAMES = (*sorted({option.name for option in (*CHECKPOINT, *FREEZING, *RESTORE, *INHIBIT)}), '', '~', 'x' * 300)
# nothing here kills or hides: after=kill would end the victim, new_pidns=true would make processes
PLAUSIBLE: dict[str, Sequence[Variant]] = {
    'freeze': [Variant('s', 'auto'), Variant('s', 'ptrace'), Variant('s', 'cgroup')],
    'after': [Variant('s', 'resume'), Variant('s', '')],
    'timeout': [Variant('u', 1), Variant('t', 3_000_000), Variant('x', -1), Variant('t', 2**64 - 1)],
    'handle_token': [Variant('s', 'a'), Variant('s', 'b'), Variant('s', '_' * 64), Variant('s', '/')],
    'force': [Variant('b', True), Variant('b', False)],
    'save_files': [Variant('b', True), Variant('b', False)],
    'external': [Variant('as', []), Variant('as', ['any:close']), Variant('as', ['x']), Variant('s', 'any:close')],
    'sysv': [Variant('as', []), Variant('as', ['sem:2147483647']), Variant('as', ['x']), Variant('s', '0')],
    'inherit': [Variant('a(sh)', []), Variant('as', ['any']), Variant('a(ss)', [['any', '0']])],
    'save_limit': [Variant('t', 0), Variant('t', 1), Variant('t', 2**63)],
    'changed_files': [Variant('s', 'refuse'), Variant('s', 'accept')],
    'leave_stopped': [Variant('b', True)],
    'target': [Variant('s', 'self'), Variant('s', 'pid:0'), Variant('s', 'cgroup:/~')],
    'new_pidns': [Variant('b', False), Variant('u', 1)],
    'clamp': [Variant('b', True), Variant('u', 1)],
}
NO_TARGETS = ('', 'pid:', 'pid:0', 'pid:-1', 'pid:4194305', 'pid:999999999', 'pid:9999999999', 'cgroup:', '/etc', '~x')
INTERFACES = (MANAGER, JOB, IMAGE, 'org.freedesktop.DBus.Peer')
PROPERTIES = ('Version', 'Jobs', 'FrozenTargets', 'State', 'Result', 'Error', 'Owner', 'Statistics')
EDGES = {'y': (0, 255), 'n': (-2**15, 2**15 - 1), 'q': (0, 2**16 - 1), 'i': (-2**31, 2**31 - 1), 'u': (0, 2**32 - 1),
         'x': (-2**63, 2**63 - 1), 't': (0, 2**64 - 1)}
# signature, bytes before the first item, an item as it follows another one, and how much of it is padding
ARRAYS = [('ay', 4, b'\0', 0), ('at', 8, bytes(8), 0), ('as', 4, bytes(8), 3), ('aay', 4, bytes(4), 0),
          ('av', 4, b'\1u\0\0\7\0\0\0', 0), ('a{sv}', 8, b'\3\0\0\0abc\0\1u\0\0\7\0\0\0', 0)]


class Row(NamedTuple):
    """A method that introspection names."""
    path: str
    interface: str
    member: str
    signature: str


@dataclass
class Tally:
    """sent: by kind of message. called, served: calls and results by method. answers: by name of the error, '' for
    results. vague: errors without a name of their own. wrong: what must not happen."""
    sent: Counter[str] = field(default_factory=Counter)
    called: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    vague: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Values:
    """Random values of a signature. real: the victim and images that exist are among them."""

    def __init__(self, dice: random.Random, victim: int, images: Sequence[str], *, real: bool) -> None:
        self._dice, self._victim, self._real = dice, victim, real
        self._images = list(images) if real else []
        self.fds: list[int] = []

    def body(self, row: Row) -> list[Any]:
        values = [self.of(kind) for kind in parse_signature(row.signature)]
        if row.interface == MANAGER and row.signature.startswith('s'):
            values[0] = self.target() if row.member in TARGETED else self.image()
        likely = {'Export': [None, 'core'], 'GetAll': [self._dice.choice(INTERFACES)],
                  'Get': [self._dice.choice(INTERFACES), self._dice.choice(PROPERTIES)]}.get(row.member, [])
        if self._dice.random() < 0.7:
            values = [value if given is None else given
                      for value, given in itertools.zip_longest(values, likely)] if likely else values
        return values

    def of(self, kind: SignatureType, depth: int = 0) -> Any:
        dice, token = self._dice, kind.token
        if token in EDGES:
            low, high = EDGES[token]
            return dice.choice((low, high, 0, 1, dice.randint(low, high)))
        if token == 'a':
            return self._array(kind.children[0], depth)
        if token in '({':
            return [self.of(child, depth + 1) for child in kind.children]
        simple = {'b': lambda: dice.random() < 0.5, 'd': lambda: dice.choice((0.0, -1e300, float('nan'), float('inf'))),
                  's': self.text, 'o': lambda: dice.choice(('/', ROOT, ROOT + '/job/1', '/a' * 100)),
                  'g': lambda: dice.choice(SIGNATURES), 'h': self._fd, 'v': lambda: self.variant(depth + 1)}
        return simple[token]()

    def _array(self, child: SignatureType, depth: int) -> Any:
        dice = self._dice
        count = dice.choice((0, 1, 2, dice.randrange(5 if depth else 50)))
        if child.token == 'y':
            return dice.randbytes(count * dice.choice((1, 100)))
        if child.token != '{':
            return [self.of(child, depth + 1) for _ in range(count)]
        if child.signature == '{sv}' and not depth:
            return self._options()
        return {self.of(child.children[0]): self.of(child.children[1], depth + 1) for _ in range(min(count, 20))}

    def _options(self) -> dict[str, Variant]:
        names = self._dice.sample(NAMES, self._dice.choice((0, 0, 0, 1, 1, 2, 4)))
        return {name: self._dice.choice(PLAUSIBLE[name]) if name in PLAUSIBLE and self._dice.random() < 0.7
                else self.variant(1) for name in names}

    def variant(self, depth: int) -> Variant:
        dice = self._dice
        if depth > 4 or dice.random() < 0.6:
            signature = dice.choice(TYPES[:-1] + 'h')
        else:
            signature = dice.choice(('v', 'a{sv}', 'as', '(sv)', 'av', 'ay', 'a(uv)', 'aas'))
        [kind] = parse_signature(signature)
        value = self.of(kind, depth)
        # of a true and a 'kill' nobody may be sure where it ends
        return Variant(kind, False if signature == 'b' else value)

    def text(self) -> str:
        dice = self._dice
        length = dice.choices((0, 1, 5, 64, 65, 300, 5000), (20, 20, 20, 5, 5, 2, 1))[0]
        return '~' + ''.join(chr(dice.choice((dice.randrange(1, 128), dice.randrange(0xA0, 0xD7FF), 0x1F600)))
                             for _ in range(length))

    def target(self) -> str:
        if self._real and self._dice.random() < 0.6:
            return f'pid:{self._victim}'
        return self._dice.choice((*NO_TARGETS, self.text()))

    def image(self) -> str:
        if self._images and self._dice.random() < 0.6:
            return self._dice.choice(self._images)
        return self._dice.choice(('', '~', '../..', '20260101_000000_x_0000', self.text()))

    def _fd(self) -> int:
        """An index, mostly of one of the fds that go along."""
        if self._dice.random() < 0.2:
            return self._dice.choice((7, 2**32 - 1, len(self.fds)))
        self.fds.append(self._dice.choice((0, 1, 2)))
        return len(self.fds) - 1


class Fuzzer:
    """Several connections of one process, each with its own dice."""

    def __init__(self, address: str, seed: str, victim: int, files: Sequence[int], limit: str) -> None:
        self._address, self._seed, self._victim, self._files = address, seed, victim, files
        is_time = limit.endswith('s')
        self._end = time.monotonic() + float(limit[:-1]) if is_time else math.inf
        self._left = math.inf if is_time else int(limit)        # messages
        self.tally = Tally()
        self._rows: list[Row] = []
        self._looked = 0.0
        self._images: list[str] = []
        self.kinds = {'call': (self._call, 16), 'signature': (self._signature, 12),
                      'fds': (self._wrong_fds, 12), 'unknown': (self._unknown, 12), 'huge': (self._huge, 3),
                      'other': (self._other, 6), 'mutated': (self._mutated, 24)}

    async def run(self) -> None:
        await self._look()
        await asyncio.gather(*(self._work(number) for number in range(CONNECTIONS)))

    @property
    def _goes_on(self) -> bool:
        return self._left > 0 and time.monotonic() < self._end

    async def _work(self, number: int) -> None:
        dice = random.Random(f'{self._seed}/{number}')
        names, weights = list(self.kinds), [weight for _, weight in self.kinds.values()]
        while self._goes_on:
            async with await Raw.open(self._address) as raw:
                with contextlib.suppress(EOFError, ConnectionError):     # the bus hangs up on nonsense
                    for _ in range(RENEW):
                        if not self._goes_on:
                            break
                        [name] = dice.choices(names, weights)
                        self.tally.sent[name] += 1
                        self._left -= 1
                        await self.kinds[name][0](raw, dice)
                        if time.monotonic() > self._looked + LOOK:
                            await self._look()

    # ------------------------------------------------------------ what there is

    async def _look(self) -> None:
        """Every method of every object, and the ids of images."""
        self._looked = time.monotonic()
        async with await Raw.open(self._address) as raw:
            rows, paths = [], ['/']
            for path in paths:
                reply = await raw.ask(to_object(BUS_NAME, path, 'org.freedesktop.DBus.Introspectable', 'Introspect'))
                if reply is None or reply.type != MessageType.RETURN:
                    continue        # it went away meanwhile
                node = ElementTree.fromstring(reply.body()[0])
                rows += [Row(path, face.attrib['name'], method.attrib['name'],
                             ''.join(arg.attrib['type'] for arg in method.iter('arg')
                                     if arg.get('direction', 'in') == 'in'))
                         for face in node.iter('interface') for method in face.iter('method')]
                paths += [f'{path.rstrip("/")}/{child.attrib["name"]}' for child in node.findall('node')]
        self._rows = rows
        self._images = [path.rpartition('/')[2] for path in paths if path.startswith(f'{ROOT}/image/')]

    def _pick(self, dice: random.Random) -> Row:
        """A method: of the manager as often as of any other object."""
        member = dice.choice(sorted({(row.interface, row.member) for row in self._rows}))
        return dice.choice([row for row in self._rows if (row.interface, row.member) == member])

    # ------------------------------------------------------------ kinds of messages

    async def _call(self, raw: Raw, dice: random.Random) -> None:
        """Random values of the right signature."""
        row = self._pick(dice)
        values = Values(dice, self._victim, self._images, real=row.member != 'CheckpointSelf')
        body = values.body(row)
        flags = dice.choice((0, 0, 0, NO_REPLY_EXPECTED, ALLOW_INTERACTIVE))
        await self._send(raw, row, row.signature, body, values.fds, flags)

    async def _signature(self, raw: Raw, dice: random.Random) -> None:
        """Values of another signature."""
        values = Values(dice, self._victim, [], real=False)
        signature = dice.choice(SIGNATURES)
        await self._send(raw, self._pick(dice), signature, [values.of(kind) for kind in parse_signature(signature)],
                         values.fds)

    async def _wrong_fds(self, raw: Raw, dice: random.Random) -> None:
        """More or fewer fds than the header or the arguments say."""
        row = self._pick(dice)
        values = Values(dice, self._victim, [], real=False)
        body = values.body(row)
        fds = [dice.choice((0, 1, 2)) for _ in range(dice.choice((0, 1, 2, 3, 16)))]
        await self._send(raw, row, row.signature, body, fds)

    async def _unknown(self, raw: Raw, dice: random.Random) -> None:
        row, names = self._pick(dice), ('x', 'org.freedesktop.DBus.Properties', 'org.ckptd1.Nothing', 'a.b')
        path = dice.choice((row.path, '/', '/nowhere', ROOT + '/job/999', ROOT + '/image', '/a/b' * 60))
        interface = dice.choice((row.interface, *names))
        member = dice.choice((row.member, 'Nothing', 'checkpoint', 'M' * 255))
        fields = to_object(BUS_NAME, path, interface, member)
        if dice.random() < 0.3:
            fields = [one for one in fields if one[0] != INTERFACE_FIELD]
        await self._answer(raw, await raw.call(fields), lambda: f'{fields}')

    async def _huge(self, raw: Raw, dice: random.Random) -> None:
        """Arrays about as long as an argument may be; marshalled by hand, for the library takes a second for one."""
        signature, start, item, padding = dice.choice(ARRAYS)
        row = dice.choice([row for row in self._rows if row.signature.endswith('a{sv}')])
        count = (MAX_BODY + dice.choice((-64, 0, 64)) - start) // len(item)
        body = struct.pack('<I', count * len(item) - padding).ljust(start, b'\0') + (item * count)[:-padding or None]
        if row.signature == 'sa{sv}' and signature == 'a{sv}':
            signature, body = row.signature, struct.pack('<I2sxx', 1, b'~') + body
        await self._answer(raw, await raw.call(to_object(BUS_NAME, *row[:3], signature), body),
                           lambda: f'{row} {signature} {item!r} * {count}')

    async def _other(self, raw: Raw, dice: random.Random) -> None:
        """Replies that nobody asked for, signals of somebody else, types that there are not."""
        kind = dice.choice((2, 3, SIGNAL, 9))
        fields: list[Field] = [(5, 'u', dice.choice((1, 2, dice.randrange(1, 2000)))), (DESTINATION, 's', BUS_NAME)]
        if kind == SIGNAL:
            fields = [(PATH, 'o', ROOT), (INTERFACE_FIELD, 's', dice.choice((MANAGER, 'org.freedesktop.DBus'))),
                      (MEMBER, 's', dice.choice(('JobNew', 'NameOwnerChanged'))), (DESTINATION, 's', BUS_NAME)]
        elif kind == 3:
            fields.append((4, 's', 'org.example.Error'))
        await raw.send(message(kind, 7777, fields))
        await self._ping(raw)

    async def _mutated(self, _: Raw, dice: random.Random) -> None:
        """A message of which some bytes are others, on a connection of its own: what follows might be its body."""
        row = self._pick(dice)
        values = Values(dice, self._victim, [], real=False)
        async with await Raw.open(self._address) as raw:
            data = bytearray(self._marshal(row, row.signature, values.body(row), len(values.fds)))
            fixed = struct.unpack_from('<I', data, 12)[0] + 16
            start = fixed if dice.random() < 0.6 and len(data) > fixed + 8 else 0
            for _ in range(dice.choice((1, 1, 2, 4, 16))):
                data[dice.randrange(start, len(data))] = dice.choice((0, 1, 0xFF, 0x7F, dice.randrange(256)))
            with contextlib.suppress(EOFError, ConnectionError):
                await raw.send(bytes(data), [self._files[number] for number in values.fds][:16])
                raw.finish()
                while True:
                    self._judge(await asyncio.wait_for(raw.receive(), ANSWER), data.hex)

    # ------------------------------------------------------------ sending and judging

    @staticmethod
    def _marshal(row: Row, signature: str, body: Sequence[Any], fds: int, flags: int = 0) -> bytes:
        call: Any = wire.make_call(BUS_NAME, row.path, row.interface, row.member, signature, body, flags)
        call.serial, call.unix_fds = 4242, [0] * fds
        return wire.marshal(call)

    async def _send(self, raw: Raw, row: Row, signature: str, body: Sequence[Any], fds: Sequence[int],
                    flags: int = 0) -> None:
        marshalled = self._marshal(row, signature, body, len(fds), flags)
        self.tally.called[row.member] += 1
        await raw.send(marshalled, [self._files[number] for number in fds])
        if flags & NO_REPLY_EXPECTED:
            await self._ping(raw)
        else:
            reply = await self._answer(raw, 4242, lambda: f'{row} {signature!r} {body!r:.2000} with {len(fds)} fds')
            self.tally.served[row.member] += reply.type == MessageType.RETURN

    async def _ping(self, raw: Raw) -> None:
        await self._answer(raw, await raw.call(to_object(BUS_NAME, ROOT, 'org.freedesktop.DBus.Peer', 'Ping')),
                           lambda: 'Ping')

    async def _answer(self, raw: Raw, serial: int, what: Callable[[], str]) -> wire.Received:
        try:
            reply = await asyncio.wait_for(raw.reply_to(serial), ANSWER)
        except TimeoutError:
            self.tally.wrong.append(f'no answer to {what()}')
            raise ConnectionError from None
        self._judge(reply, what)
        return reply

    def _judge(self, reply: wire.Received, what: Callable[[], str]) -> None:
        if reply.type not in (MessageType.RETURN, MessageType.ERROR):
            return
        self.tally.answers[reply.error_name] += 1
        words = reply.body()[0] if reply.type == MessageType.ERROR and reply.signature.startswith('s') else ''
        if reply.error_name == f'{ERROR_PREFIX}Failed':
            self.tally.vague.append(f'{words}: answer to {what()}')
        if 'internal error' in words or reply.error_name.endswith('NoReply'):
            self.tally.wrong.append(f'{reply.error_name}: {words}: answer to {what()}')


@contextlib.contextmanager
def files(victim: int) -> Iterator[list[int]]:
    """To pass: what is no pidfd, the victim's, and a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    opened = [os.open('/dev/null', os.O_RDWR), os.pidfd_open(victim), writer]
    try:
        yield opened
    finally:
        for fd in opened:
            os.close(fd)


def main() -> None:
    address, seed, limit, uid, victim = sys.argv[1:]
    if os.geteuid() == 0:       # after the imports: the interpreter may be where only root can read
        os.setgroups([])
        os.setgid(int(uid))
        os.setuid(int(uid))
    with files(int(victim)) as opened:
        fuzzer = Fuzzer(address, seed, int(victim), opened, limit)
        asyncio.run(fuzzer.run())
    print(json.dumps(msgspec.to_builtins(fuzzer.tally)))


if __name__ == '__main__':
    main()
