# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real programs: checkpointed while they work, killed, restarted; the right answer comes out.

Each works until it is told that it is enough, which happens after the kill: so it was in the middle when it was dumped,
and what says so goes to the program that was restarted. It tells by files only, as nobody holds a pipe to it.
"""

import gzip
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lib.victim import Victim
from tests.programs.conftest import WORK, Standalone, advanced, await_that, chained, pooled
from tests.programs.test_programs import COUNT, Program, locked_out

pytestmark = [pytest.mark.needs('dbus', 'ptrace'), pytest.mark.timeout(240)]


@dataclass(frozen=True)
class Computing:
    """A program of work/: it makes the file `working` and goes on until there is `enough`, then says lines of a number
    of rounds and what came of them. tasks: at least so many when it works."""
    command: tuple[str | Path, ...]
    lines: int
    processes: int
    tasks: int
    result: Callable[[int], int | str]


COMPUTING = {
    'python': Computing((sys.executable, '-I', WORK / 'pool.py'), 1, 4, 7, pooled),
    'perl': Computing(('perl', WORK / 'compute.pl'), 1, 1, 1, lambda rounds: advanced(1, rounds)),
    # the event loop, the threads of V8's platform and of libuv's pool
    'node': Computing(('node', WORK / 'compute.js'), 1, 1, 6, chained),
    # three workers beside collector, compilers and watchers
    'java': Computing(('java', WORK / 'Compute.java'), 3, 1, 15, lambda rounds: advanced(1, rounds)),
}


@pytest.mark.parametrize('name', [
    'python', pytest.param('perl', marks=pytest.mark.needs('perl')),
    pytest.param('node', marks=pytest.mark.needs('node')), pytest.param('java', marks=pytest.mark.needs('java'))])
def test_computing(program: Program, standalone: Standalone, tmp_path: Path, name: str) -> None:
    """Interpreters and virtual machines, started as anybody starts them."""
    wanted = COMPUTING[name]
    process = program(*wanted.command)
    await_that(f'{name} works', lambda: (tmp_path / 'working').exists() or process.poll() is not None)
    result = standalone.checkpoint_and_kill(process)
    assert (tmp_path / 'output').read_text() == ''
    assert result['processes'] == wanted.processes
    assert result['tasks'] >= wanted.tasks
    (tmp_path / 'enough').write_text('yes\n')
    with standalone.restore(result['image']) as restored:
        restored.finish()
    assert (tmp_path / 'output.errors').read_text() == ''
    lines = (tmp_path / 'output').read_text().splitlines()
    assert len(lines) == wanted.lines
    for line in lines:
        rounds, value = line.split()
        assert int(rounds) > 0
        assert value == str(wanted.result(int(rounds)))


def test_shell_pipeline(program: Program, standalone: Standalone, tmp_path: Path) -> None:
    """Full and empty pipes between four programs that all work."""
    process = program('sh', '-c', f"awk '{COUNT}' | sed 's/^/line /' | gzip -1 | cat > lines.gz; echo $?")
    compressed = tmp_path / 'lines.gz'
    await_that('the pipeline is full', lambda: compressed.exists() and compressed.stat().st_size > 100_000)
    result = standalone.checkpoint_and_kill(process)
    assert result['processes'] == 5
    size = compressed.stat().st_size
    with pytest.raises(EOFError), gzip.open(compressed, 'rt') as lines:     # it was in the middle
        lines.read()
    (tmp_path / 'enough').write_text('yes\n')
    with standalone.restore(result['image']) as restored:
        restored.finish()
    assert (tmp_path / 'output').read_text() == '0\n'
    assert (tmp_path / 'output.errors').read_text() == ''
    assert compressed.stat().st_size > size     # what was in the pipes and in gzip, at least
    with gzip.open(compressed, 'rt') as lines:
        assert all(line == f'line {number}\n' for number, line in enumerate(lines, 1))


# the large file again and again, as lines of a pipe
AGAIN = """BEGIN {
    while ((getline line < "enough") < 0) {
        while ((getline line < "numbers") > 0) print line
        close("numbers")
        passes++
    }
    print passes > "passes"
}"""


def test_sort_of_a_large_file(program: Program, standalone: Standalone, tmp_path: Path) -> None:
    """Threads, a large heap, temporary files that sort has made, and that it merges and deletes after the restart."""
    numbers = random.Random(1).sample(range(10**9), 100_000)
    (tmp_path / 'numbers').write_text(''.join(f'{number}\n' for number in numbers))
    process = program('sh', '-c', f"awk '{AGAIN}' | sort -n --parallel=2 -S 4M -T . | uniq -c", output='sorted')
    await_that('sort has temporary files', lambda: temporary_files(tmp_path))
    result = standalone.checkpoint_and_kill(process)
    assert result['processes'] == 4
    assert temporary_files(tmp_path)
    assert (tmp_path / 'sorted').read_text() == ''
    (tmp_path / 'enough').write_text('yes\n')
    with standalone.restore(result['image']) as restored:
        restored.finish()
    assert (tmp_path / 'sorted.errors').read_text() == ''
    assert not temporary_files(tmp_path)
    passes = (tmp_path / 'passes').read_text().strip()
    with (tmp_path / 'sorted').open() as lines:
        assert [line.split() for line in lines] == [[passes, str(number)] for number in sorted(numbers)]


def temporary_files(directory: Path) -> list[Path]:
    """Those of sort(1): sortXXXXXX."""
    return [path for path in directory.glob('sort??????') if path.name != 'sorted']


SCRIPT = """create table t(n integer primary key, v text);
pragma cache_size = 10;
{first}
begin;
{second}
.shell touch here; until [ -e enough ]; do : > beat; sleep 0.02; done
{third}
commit;
pragma integrity_check;
select count(*), sum(n) from t;
"""


def inserts(numbers: range) -> str:
    return '\n'.join(f'insert into t values({number}, hex(randomblob(200)));' for number in numbers)


@pytest.mark.needs('sqlite3')
def test_sqlite3_in_a_transaction(program: Program, standalone: Standalone, tmp_path: Path) -> None:
    """With its locks, its journal, and a shell that it waits for."""
    (tmp_path / 'script').write_text(SCRIPT.format(first=inserts(range(20)), second=inserts(range(20, 2000)),
                                                   third=inserts(range(2000, 3000))))
    process = program('sqlite3', '-batch', 'data.db', '.read script')
    await_that('sqlite3 is in the transaction', (tmp_path / 'here').exists)
    assert (tmp_path / 'data.db-journal').exists()
    assert locked_out(tmp_path)     # what did not fit into its cache is in the file already
    result = standalone.checkpoint_and_kill(process)
    assert result['processes'] >= 2
    # nobody may look at the database now: without its locks the journal is hot, and whoever comes rolls back
    (tmp_path / 'beat').unlink()
    with standalone.restore(result['image']) as restored:
        restored.await_that('the shell goes on', (tmp_path / 'beat').exists)
        assert locked_out(tmp_path)
        (tmp_path / 'enough').touch()
        restored.finish()
    assert (tmp_path / 'output.errors').read_text() == ''
    assert (tmp_path / 'output').read_text().splitlines() == ['ok', f'3000|{sum(range(3000))}']
    assert not locked_out(tmp_path)


FUNCTIONS = 500
FUNCTION = """static unsigned f{0}(unsigned a, unsigned b)
{{
    unsigned s = {0};
    for (unsigned i = 0; i < a; i++)
        for (unsigned j = 0; j < b; j++)
            s = s * 31 + (i ^ j) % (s | 1) + (i * {0} + j * 7) / (a + b + 1);
    return s;
}}
"""


def source() -> Iterator[str]:
    """A C program that the compiler is busy with for some seconds."""
    yield '#include <stdio.h>\n'
    yield from (FUNCTION.format(number) for number in range(FUNCTIONS))
    yield 'int main(void)\n{\n    unsigned s = 0;\n'
    yield from (f'    s = s * 31 + f{number}(3, 4);\n' for number in range(FUNCTIONS))
    yield '    printf("%u\\n", s);\n    return 0;\n}\n'


def answer() -> int:
    """What that program says."""
    word, total = 2**32, 0
    for number in range(FUNCTIONS):
        s = number
        for i in range(3):
            for j in range(4):
                s = (s * 31 + (i ^ j) % (s | 1) + (i * number + j * 7) // 8) % word
        total = (total * 31 + s) % word
    return total


@pytest.mark.needs('gcc', 'ps')
def test_gcc_compiling(program: Program, standalone: Standalone, tmp_path: Path) -> None:
    """The driver waits, the compiler works; the assembler and the linker run only after the restart."""
    (tmp_path / 'large.c').write_text(''.join(source()))
    process = program('gcc', '-O2', '-o', 'large', 'large.c')
    await_that('the compiler proper works', lambda: 'cc1' in children_of(process.pid))
    result = standalone.checkpoint_and_kill(process)
    assert result['processes'] == 2
    assert not (tmp_path / 'large').exists()
    with standalone.restore(result['image']) as restored:
        restored.finish()
    assert (tmp_path / 'output.errors').read_text() == ''
    done = subprocess.run([tmp_path / 'large'], capture_output=True, text=True, check=True)
    assert done.stdout == f'{answer()}\n'


def children_of(pid: int) -> list[str]:
    """Their names."""
    done = subprocess.run(['ps', '-o', 'comm=', '--ppid', str(pid)], capture_output=True, text=True, check=False)
    return done.stdout.split()


@pytest.mark.needs('gcc')
def test_c_program_with_100_threads(victim: Callable[..., Victim], standalone: Standalone) -> None:
    """A third of them always works under one futex lock; each checks itself and the sum of all rounds."""
    running = victim('threads')
    result = standalone.checkpoint_and_kill(running.process)
    assert result['tasks'] == 101
    with running.told_to_go(), standalone.restore(result['image']) as restored:
        restored.finish()
    assert running.output == ''


DEAD_LEADER = """
import os, time
pid = os.fork()
if pid == 0:
    os.setsid()
    os._exit(7)
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
open('working', 'w').close()
while not os.path.exists('enough'):
    time.sleep(0.01)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_dead_leader_of_a_session(program: Program, standalone: Standalone, tmp_path: Path) -> None:
    """It gets no terminal of the restart that waits."""
    process = program(sys.executable, '-I', '-c', DEAD_LEADER)
    await_that('its child is dead', (tmp_path / 'working').exists)
    image = standalone.checkpoint_and_kill(process)['image']
    (tmp_path / 'enough').touch()
    with standalone.restore(image) as restored:
        restored.finish()
    assert (tmp_path / 'output').read_text() == '7\n'
