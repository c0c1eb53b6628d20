# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trees in namespaces that no restart makes: said by the checkpoint, refused with after=kill, known again by their
id."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ckptd.errors import Finding, Refused, finding_from
from ckptd.image import records as r
from ckptd.image.reader import ImageReader
from ckptd.inspect.scan import scan_tree
from ckptd.kernel import nsfs
from ckptd.kernel.timens import setns
from ckptd.objects.namespaces import registry
from ckptd.objects.namespaces.base import BirthNamespaces
from tests.lib.altered import alter
from tests.lib.brood import Brood
from tests.lib.settled import reap_orphans
from tests.worker.driver import DirectWorker, Place
from tests.worker.test_namespaces import other_boot

START = Callable[..., 'subprocess.Popen[bytes]']
pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc')]


@pytest.fixture
def apart() -> Iterator[START]:
    """apart('--mount'): a sleeping process in new namespaces, of unshare(1)."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*options: str, command: str = 'echo; exec sleep 1000') -> subprocess.Popen[bytes]:
        process = subprocess.Popen(['unshare', *options, 'sh', '-c', command], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, close_fds=True)
        running.append(process)
        assert process.stdout is not None
        with process.stdout:
            process.stdout.readline()
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()
    reap_orphans()


def checked(place: Place, pid: int) -> list[Finding]:
    with DirectWorker() as worker:
        rows = worker.run(place.request(pid, 'check'))['refusals']
    return [row for row in map(finding_from, rows) if row.resource.startswith('namespace')]


@pytest.mark.parametrize(('option', 'name'), [('--mount', 'mnt'), ('--net', 'net'), ('--ipc', 'ipc')])
def test_a_checkpoint_says_it_and_a_kill_is_refused(apart: START, place: Place,
                                                    option: str, name: str) -> None:
    process = apart(option)
    assert [(row.pid, row.resource, row.severity) for row in checked(place, process.pid)] == [
        (process.pid, f'namespace {name}', 'unrestorable')]
    with pytest.raises(Refused, match=f'{name} namespace of its own') as caught:
        place.checkpoint(process.pid, after='kill')
    assert caught.value.exit_status == 3
    assert 'nsenter' in caught.value.hint
    assert process.poll() is None
    place.checkpoint(process.pid)
    assert process.poll() is None
    place.checkpoint(process.pid, after='kill', force=True)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize('options', [['--uts'], ['--cgroup'], []])
def test_what_is_only_shown_hinders_nothing(apart: START, place: Place,
                                            options: list[str]) -> None:
    process = apart(*options)
    assert checked(place, process.pid) == []
    place.checkpoint(process.pid, after='kill')
    assert process.wait() == -signal.SIGKILL


@pytest.fixture
def elsewhere(apart: START, place: Place) -> tuple[Path, int]:
    """The image of a tree in a mount namespace of its own, and a process that lives on in that namespace."""
    keeper = apart('--mount', command='sleep 1000 & echo; exec sleep 1001 >/dev/null')
    child = int(Path(f'/proc/{keeper.pid}/task/{keeper.pid}/children').read_text())
    return place.checkpoint(child, after='kill', force=True), keeper.pid


def refused(image: Path, inside: int = 0) -> list[str]:
    """The namespaces that a restart refuses, which is made in the mount namespace of a process."""
    def work() -> list[str]:
        if inside:
            setns(os.open(f'/proc/{inside}/ns/mnt', os.O_RDONLY), 0)
        with ImageReader(image) as reader:
            rows = registry.restart_findings(reader, 1, BirthNamespaces(False, False, None))
            return [row.resource for row in rows if row.severity == 'refusal']

    with Brood() as brood:
        return list(brood.ask(work)[1])


def test_known_by_its_id(elsewhere: tuple[Path, int]) -> None:
    image, keeper = elsewhere
    assert refused(image) == ['namespace mnt']
    assert refused(image, keeper) == []


def test_a_stranger_with_the_same_inode_number(elsewhere: tuple[Path, int]) -> None:
    """As the next namespace has, when the former one is gone."""
    image, keeper = elsewhere
    with ImageReader(image) as reader:
        [kept] = reader.every(r.Namespaces)
    assert all(kept.ids)
    alter(image, r.Namespaces, ids=tuple(number + 1000 for number in kept.ids))
    assert refused(image, keeper) == ['namespace mnt']


@pytest.mark.parametrize('lives', [True, False])
def test_a_kernel_without_ids(apart: START, place: Place, lives: bool,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    """There a process that lived on is the proof."""
    keeper = apart('--mount', command='sleep 1000 & echo; exec sleep 1001 >/dev/null')
    child = int(Path(f'/proc/{keeper.pid}/task/{keeper.pid}/children').read_text())
    monkeypatch.setattr(nsfs, 'NS_GET_ID', 0)      # ENOTTY
    nsfs.machine_namespaces.cache_clear()
    kept = registry.record(scan_tree([child]).root)
    assert set(kept.ids) == {0}
    assert keeper.pid in [holder.pid for holder in kept.holders]
    image = place.checkpoint(child, after='kill', force=True)
    alter(image, r.Namespaces, namespaces=kept.namespaces, ids=kept.ids,
          holders=kept.holders if lives else tuple(replace(one, start_time=1) for one in kept.holders))
    assert refused(image) == ['namespace mnt']
    assert refused(image, keeper.pid) == ([] if lives else ['namespace mnt'])
    nsfs.machine_namespaces.cache_clear()


def test_dumped_from_inside_and_restored_outside(elsewhere: tuple[Path, int]) -> None:
    """It was the dumping process's own, which does not make it ours."""
    image, keeper = elsewhere
    with ImageReader(image) as reader:
        [kept] = reader.every(r.Namespaces)
    alter(image, r.Namespaces, namespaces=tuple(replace(one, own=2) for one in kept.namespaces))
    assert refused(image) == ['namespace mnt']
    assert refused(image, keeper) == []


def test_on_another_boot_numbers_mean_nothing(elsewhere: tuple[Path, int]) -> None:
    image, keeper = elsewhere
    other_boot(image)
    assert refused(image, keeper) == ['namespace mnt']


def test_kill_of_an_init_with_children(apart: START, place: Place) -> None:
    """The init of a pid namespace ends after all others of it were reaped, by their tracer."""
    outer = apart('--pid', '--fork', '--mount-proc', command='sleep 1000 & sleep 1001 & echo; exec sleep 1002')
    init = int(Path(f'/proc/{outer.pid}/task/{outer.pid}/children').read_text())
    began = time.monotonic()
    place.checkpoint(init, after='kill', force=True)
    assert time.monotonic() - began < 60
    outer.wait(10)
    assert not Path(f'/proc/{init}').exists()
