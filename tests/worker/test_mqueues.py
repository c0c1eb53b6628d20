# SPDX-License-Identifier: LGPL-2.1-or-later
"""POSIX message queues that are refused, and those that are others at the restart."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from ckptd.errors import Busy, CkptError, Refused
from ckptd.image.manifest import read_manifest
from ckptd.image.records import SavedFile
from ckptd.kernel.mqueue import mq_create, mq_open, mq_unlink
from ckptd.objects.files.mqueue import MessageQueue
from tests.lib import settled
from tests.lib.altered import read_part, write_part
from tests.worker.driver import Place
from tests.worker.test_restore import Generation, generation

__all__ = ['generation']
pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]

# a queue with one message; its arguments are further statements; `libc` is there
PROGRAM = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
name = b'/ckptd-test-%d' % os.getpid()
queue = libc.mq_open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, None)
assert queue >= 0
exec(sys.argv[1])
print('ready', flush=True)
os.close(1)
signal.pause()
"""
SEND = "assert libc.mq_send(queue, b'x', 1, 7) == 0; "
UNLINK = 'assert libc.mq_unlink(name) == 0; '
NOTIFY = ("event = bytes(8) + (10).to_bytes(4, 'little') + (0).to_bytes(4, 'little') + bytes(48); "
          "assert libc.mq_notify(queue, event) == 0; ")


@pytest.fixture
def program() -> Iterator[Callable[[str], int]]:
    """program(statements): the pid of one that has executed them, and waits."""
    running: list[subprocess.Popen[str]] = []

    def start(statements: str) -> int:
        running.append(subprocess.Popen([sys.executable, '-c', PROGRAM, statements], stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                        start_new_session=True))
        assert running[-1].stdout is not None
        assert running[-1].stdout.readline() == 'ready\n'
        return running[-1].pid

    yield start
    for one in running:
        one.kill()
        one.communicate()
        try:
            mq_unlink(f'ckptd-test-{one.pid}')
        except FileNotFoundError:
            continue


def test_an_unlinked_queue_with_messages(place: Place, program: Callable[[str], int]) -> None:
    """They can only be received."""
    pid = program(SEND + UNLINK)
    with pytest.raises(Refused) as refused:
        place.checkpoint(pid)
    [row] = refused.value.refusals
    assert row.reason == (f'the message queue ckptd-test-{pid} was unlinked and has 1 messages (1 bytes), which can '
                          'only be received')
    assert 'mq_unlink' in row.hint


def test_a_value_of_a_notification_is_lost(place: Place, program: Callable[[str], int]) -> None:
    pid = program(NOTIFY)
    image = place.checkpoint(pid)
    assert [row.reason for row in read_manifest(image).warnings if 'signal 10' in row.reason] != []


def test_a_queue_of_that_name_that_is_another(generation: Callable[..., Generation]) -> None:
    tree = generation('mqueues')
    image = tree.kill()
    name = f'ckptd-victim-{tree.victim.pid}-0'
    old = mq_open(name, os.O_RDWR)      # keeps its inode from being used again
    try:
        mq_unlink(name)
        with pytest.raises(Refused, match=f'the message queue {name} is gone'):
            tree.restore(image)
        os.close(mq_create(name, 5, 100))
        with pytest.raises(Refused, match=f'the message queue {name} is another one'):
            tree.restore(image)
        tree.restore(image, changed_files='accept')
    finally:
        os.close(old)
        for number in range(2):
            mq_unlink(f'ckptd-victim-{tree.victim.pid}-{number}')


def test_a_notification_that_another_process_has(generation: Callable[..., Generation]) -> None:
    tree = generation('mqueues')
    image = tree.kill()
    name = f'ckptd-victim-{tree.victim.pid}-1'
    script = ("import ctypes, os, sys; libc = ctypes.CDLL(None); "
              "queue = libc.mq_open(sys.argv[1].encode(), os.O_RDWR); "
              "assert libc.mq_notify(queue, bytes(12) + (1).to_bytes(4, 'little') + bytes(48)) == 0; "
              "print('ready', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, '-c', script, f'/{name}'], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == 'ready\n'
        with pytest.raises(Busy, match=f'cannot be notified of messages in the queue {name} again'):
            tree.restore(image)
        settled.reap_orphans()
        other.communicate()
    tree.restore(image)
    tree.finish()


@pytest.mark.parametrize('fields', [{'maxmsg': 1 << 63}, {'msgsize': 1 << 63}, {'name': 'x/../y'}, {'name': 'x' * 300}])
def test_a_queue_that_cannot_be_made(generation: Callable[..., Generation], fields: dict[str, object]) -> None:
    """A crafted image. Nothing is left behind."""
    tree = generation('mqueues')
    image = tree.kill()
    records = read_part(image, 'FILE')
    for number, one in enumerate(records):
        if isinstance(one, SavedFile) and one.kind == 'mqueue':
            record = MessageQueue.decode(one.data)
            if record.unlinked:
                records[number] = replace(one, data=replace(record, **fields).encode())
    write_part(image, 'FILE', records)
    with pytest.raises(CkptError):
        tree.restore(image)
    settled.reap_orphans()
    for number in range(2):
        mq_unlink(f'ckptd-victim-{tree.victim.pid}-{number}')
