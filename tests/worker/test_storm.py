# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trees that never stand still: they fork, exec and start threads. A checkpoint of them is done, or says EAGAIN."""

import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.errors import NoSuchTarget, TreeChanged
from ckptd.image.verify import verify
from tests.lib.victim import kill_session
from tests.worker.driver import Place
from tests.worker.unharmed import left_in_journal, left_in_spool

pytestmark = [pytest.mark.needs('root', 'cgroup2', 'ptrace', 'gcc'), pytest.mark.timeout(180)]

TARGETS = 1500
ATTEMPTS = 8
ROUNDS = 4
# each target is a shell that forks and executes two programs; four at a time
MAKEFILE = """
all: $(addprefix out/,$(shell seq {targets}))
out/%:
\t@echo $* | cat > $@
"""
# threads that live for a moment, and a program that executes itself over and over
THREADS = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void *add(void *sum) { return __atomic_add_fetch((long *)sum, 1, __ATOMIC_RELAXED), NULL; }

int main(int argc, char **argv)
{
    long done = argc > 1 ? atol(argv[1]) : 0, sum = 0;
    pthread_t threads[8];
    char text[32];

    for (int round = 0; round < 20; round++) {
        for (int i = 0; i < 8; i++)
            if (pthread_create(&threads[i], NULL, add, &sum))
                return 2;
        for (int i = 0; i < 8; i++)
            pthread_join(threads[i], NULL);
    }
    if (sum != 160)
        return 3;
    if (access("enough", F_OK) == 0)
        return printf("%ld\n", done + sum), 0;
    snprintf(text, sizeof text, "%ld", done + sum);
    execl(argv[0], argv[0], text, (char *)0);
    return 4;
}
"""
Start = Callable[..., 'subprocess.Popen[bytes]']


@pytest.fixture
def start(tmp_path: Path, cgroup: Path) -> Iterator[Start]:
    """Start a program in a cgroup of its own, in a session of its own; what is left of it at the end is killed."""
    running: list[subprocess.Popen[bytes]] = []

    def run(*command: str | Path) -> 'subprocess.Popen[bytes]':
        with (tmp_path / 'output').open('wb') as output:
            running.append(subprocess.Popen(
                command, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                preexec_fn=lambda: (cgroup / 'cgroup.procs').write_text('0')))
        return running[-1]

    yield run
    for process in running:
        kill_session(process.pid)
        process.wait()


def attempts(process: 'subprocess.Popen[bytes]', place: Place, freeze: str) -> list[str]:
    """What became of one checkpoint after another: 'done', or EAGAIN."""
    said = []
    for _ in range(ATTEMPTS):
        if process.poll() is not None:
            break
        try:
            image = place.checkpoint(process.pid, freeze=freeze)
        except TreeChanged as error:
            said.append(errno.errorcode[error.errno])
        except NoSuchTarget:
            assert process.wait(10) == 0
        else:
            said.append('done')
            assert verify(image) == []
        assert [*left_in_spool(place.spool), *left_in_journal(place.runtime)] == []
    return said


@pytest.mark.parametrize('freeze', ['cgroup', 'ptrace'])
def test_make_with_many_jobs(start: Start, tmp_path: Path, freeze: str) -> None:
    place = Place(tmp_path).make()
    (tmp_path / 'Makefile').write_text(MAKEFILE.format(targets=TARGETS))
    (tmp_path / 'out').mkdir()
    said: list[str] = []
    for _ in range(ROUNDS):     # a busy machine has time for few attempts in each
        for path in (tmp_path / 'out').iterdir():
            path.unlink()
        process = start('make', '--silent', '-j4')
        said += attempts(process, place, freeze)
        assert process.wait(120) == 0, (tmp_path / 'output').read_text()
        assert (tmp_path / 'output').read_text() == ''
        made = {path.name: path.read_text() for path in (tmp_path / 'out').iterdir()}
        assert made == {str(number): f'{number}\n' for number in range(1, TARGETS + 1)}
        if 'done' in said:
            break
    assert set(said) == {'done', 'EAGAIN'} or set(said) == {'done'}


@pytest.mark.parametrize('freeze', ['cgroup', 'ptrace'])
def test_threads_and_execs(start: Start, tmp_path: Path, freeze: str) -> None:
    place = Place(tmp_path).make()
    subprocess.run(['gcc', '-O1', '-pthread', '-x', 'c', '-', '-o', tmp_path / 'storm'], input=THREADS, text=True,
                   check=True)
    process = start(tmp_path / 'storm')
    said = attempts(process, place, freeze)
    (tmp_path / 'enough').touch()
    assert process.wait(120) == 0, (tmp_path / 'output').read_text()
    total = int((tmp_path / 'output').read_text())
    assert total
    assert total % 160 == 0
    assert len(said) == ATTEMPTS
    assert set(said) <= {'done', 'EAGAIN'}
    assert 'done' in said
