# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trees that come back in namespaces of their own: pids, and clocks that go on after a reboot."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from ckptd.image.manifest import NAME, encode_manifest, read_manifest
from ckptd.image.reader import ImageReader
from ckptd.kernel.status import read_status
from tests.lib import settled
from tests.lib.victim import Victim
from tests.worker.driver import DirectWorker, Place

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc')]

SECOND = 10**9


@pytest.fixture
def restored() -> Iterator[Callable[..., int]]:
    """The host's pid of a root that was restored; what is left of its tree at the end is killed."""
    roots: list[int] = []

    def run(place: Place, image: Path, **more: object) -> int:
        settled.reap_orphans()
        with DirectWorker() as worker:
            result = worker.run(place.request(0, operation='restore', image=image.name, **more))
        roots.append(int(result['root']))
        return roots[-1]

    yield run
    for root in roots:
        try:
            top = read_status(root).ppid if len(read_status(root).ns_pid) > 1 else root
            os.kill(top, signal.SIGKILL)
        except ProcessLookupError:
            continue


def killed(place: Place, running: Victim) -> Path:
    image = place.checkpoint(running.pid, after='kill')
    running.process.wait()
    return image


def wait_of(init: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(init, 0)[1])


@pytest.mark.parametrize('name', ['files', 'memory', 'threads', 'tree'])
def test_new_pid_namespace(victim: Callable[..., Victim], place: Place, restored: Callable[..., int],
                           name: str) -> None:
    """The same numbers inside, and an init of a few instructions that ends as the root does."""
    running = victim(name, *(['1'] if name == 'tree' else []))
    root = restored(place, killed(place, running), new_pidns=True)
    status = read_status(root)
    assert status.ns_pid[-1] == running.pid
    assert len(status.ns_pid) == 2
    init = status.ppid
    assert read_status(init).ns_pid[-1] == 1
    assert read_status(init).name == 'ckptd-init'
    assert os.listdir(f'/proc/{init}/fd') == []  # noqa: PTH208
    running.go()
    assert wait_of(init) == 0, running.output


def test_two_at_a_time(victim: Callable[..., Victim], place: Place, restored: Callable[..., int]) -> None:
    """Of one image, beside each other."""
    running = victim('threads')
    image = killed(place, running)
    roots = [restored(place, image, new_pidns=True) for _ in range(2)]
    assert {read_status(root).ns_pid[-1] for root in roots} == {running.pid}
    inits = [read_status(root).ppid for root in roots]
    for _ in roots:
        running.go()        # each takes one word
    assert [wait_of(init) for init in inits] == [0, 0], running.output


def test_namespace_again(victim: Callable[..., Victim], place: Place, restored: Callable[..., int]) -> None:
    """What lives in a namespace of its own is dumped from outside, and comes back in a new one without being asked."""
    running = victim('pipes')
    first = restored(place, killed(place, running), new_pidns=True)
    init = read_status(first).ppid
    image = place.checkpoint(first, after='kill')
    wait_of(init)
    second = restored(place, image)
    assert read_status(second).ns_pid[-1] == running.pid
    init = read_status(second).ppid
    running.go()
    assert wait_of(init) == 0, running.output


def test_killed_root_ends_the_namespace_as_a_shell_says_it(victim: Callable[..., Victim], place: Place,
                                                           restored: Callable[..., int]) -> None:
    running = victim('memory')
    root = restored(place, killed(place, running), new_pidns=True)
    init = read_status(root).ppid
    os.kill(root, signal.SIGTERM)
    assert wait_of(init) == 128 + signal.SIGTERM


def other_boot(image: Path) -> None:
    """Make it look as if the machine had been booted anew since."""
    manifest = msgspec.structs.replace(read_manifest(image), boot_id='00000000-0000-0000-0000-000000000000')
    (image / NAME).write_bytes(encode_manifest(manifest))


@pytest.mark.needs('time-namespaces')
def test_clocks_go_on_after_a_reboot(victim: Callable[..., Victim], place: Place, restored: Callable[..., int]) -> None:
    """CLOCK_MONOTONIC and CLOCK_BOOTTIME of the tree go on from where they were, timers and sleeps with them."""
    running = victim('interrupted')
    image = killed(place, running)
    other_boot(image)
    with ImageReader(image) as reader:
        then = reader.manifest.clocks.monotonic
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    root = restored(place, image)
    offsets = Path(f'/proc/{root}/timens_offsets').read_text().split()
    offset = int(offsets[1]) * SECOND + int(offsets[2])
    assert Path(f'/proc/{root}/ns/time').readlink() != Path('/proc/self/ns/time').readlink()
    # that of the restart's own moment, which is after ours
    assert then - now - 10 * SECOND < offset <= then - now
    running.go()
    assert wait_of(root) == 0, running.output


@pytest.mark.needs('time-namespaces')
def test_clocks_of_a_second_generation(victim: Callable[..., Victim], place: Place,
                                       restored: Callable[..., int]) -> None:
    """A tree with offsets keeps them on the same boot."""
    running = victim('memory')
    image = killed(place, running)
    other_boot(image)
    first = restored(place, image)
    offsets = Path(f'/proc/{first}/timens_offsets').read_text()
    image = place.checkpoint(first, after='kill')
    os.waitpid(first, 0)
    second = restored(place, image)
    assert Path(f'/proc/{second}/timens_offsets').read_text() == offsets
    running.go()
    assert wait_of(second) == 0, running.output
