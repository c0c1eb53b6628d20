# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trees that change while they are looked at: looked at again, and not refused for tasks that are gone."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.errors import TreeChanged
from ckptd.kernel.numbers import numbers_in_use
from tests.lib.brood import fork
from tests.worker.driver import DirectWorker, Place

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc')]

VFORK = """
#include <stdlib.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    if (vfork() == 0) {
        write(1, "r", 1);
        usleep(atoi(argv[1]));
        execl("/bin/sleep", "sleep", "1000", (char *)0);
    }
    pause();
}
"""


@pytest.fixture
def vfork(tmp_path: Path) -> Iterator[Callable[[int], int]]:
    """vfork(usec): the pid of a process whose child runs a program after that time."""
    running: list[subprocess.Popen[bytes]] = []

    def start(usec: int) -> int:
        source, program = tmp_path / 'program.c', tmp_path / 'program'
        source.write_text(VFORK)
        subprocess.run(['gcc', '-w', '-o', program, source], check=True)
        process = subprocess.Popen([program, str(usec)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        running.append(process)
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.read(1) == b'r'
        return process.pid

    yield start
    for process in running:
        subprocess.run(['kill', '-KILL', *Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split(),
                        str(process.pid)], check=True)
        process.wait()


def test_short_lived_children(place: Place) -> None:
    shell = subprocess.Popen(['sh', '-c', 'while :; do /bin/true; done'], stdin=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(3):
            with DirectWorker() as worker:
                rows = worker.run(place.request(shell.pid, 'check'))['refusals']
            assert [row for row in rows if 'died' in row['reason']] == []
    finally:
        shell.kill()
        shell.wait()


def test_a_child_of_vfork_that_runs_a_program_soon(place: Place, vfork: Callable[[int], int]) -> None:
    place.checkpoint(vfork(200_000))


def test_a_child_of_vfork_that_never_does(place: Place, vfork: Callable[[int], int]) -> None:
    with pytest.raises(TreeChanged, match='waits in vfork'):
        place.checkpoint(vfork(1_000_000_000))


def test_a_zombie_holds_its_pid() -> None:
    pid = fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        assert numbers_in_use()[pid].endswith(f'[{pid}], dead: its parent, process {os.getpid()}, has not waited for '
                                              'it')
    finally:
        os.waitpid(pid, 0)
