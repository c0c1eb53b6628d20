# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real programs: checkpointed while they work, unharmed afterwards with the right answer, their cores opened by gdb."""

import gzip
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lib.bus import family
from tests.lib.victim import Victim
from tests.programs.conftest import WORK, Standalone, await_that, backtraces, pooled

pytestmark = [pytest.mark.needs('dbus', 'ptrace', 'gdb'), pytest.mark.timeout(240)]

Program = Callable[..., 'subprocess.Popen[bytes]']


def test_python_multiprocessing_pool(program: Program, standalone: Standalone, tmp_path: Path) -> None:
    """Processes, threads, pipes, POSIX semaphores in shared memory."""
    process = program(sys.executable, '-I', WORK / 'pool.py')
    await_that('the pool works', (tmp_path / 'working').exists)
    result = standalone.checkpoint(process.pid)
    assert process.poll() is None
    (tmp_path / 'enough').touch()
    assert result['processes'] == 4
    cores = standalone.cores(result['image'])
    assert len(cores) == 4
    # the parent: itself and the pool's three helper threads; the workers have one each
    assert len(backtraces(sys.executable, cores[process.pid])) == 4
    assert sorted(len(backtraces(sys.executable, core)) for core in cores.values()) == [1, 1, 1, 4]
    assert process.wait(200) == 0, (tmp_path / 'output.errors').read_text()
    count, total = map(int, (tmp_path / 'output').read_text().split())
    assert total == pooled(count)


# counts until there is a file of that name
COUNT = """BEGIN { while ((getline line < "enough") < 0) print ++n }"""
LAST = 'END { print NR, $1 }'


def test_shell_pipeline(program: Program, standalone: Standalone, tmp_path: Path) -> None:
    """Full and empty pipes between four programs that all work."""
    process = program('sh', '-c', f"awk '{COUNT}' | sed 's/^/line /' | gzip -1 | cat > lines.gz; echo $?")
    compressed = tmp_path / 'lines.gz'
    await_that('the pipeline is full', lambda: compressed.exists() and compressed.stat().st_size > 100_000)
    result = standalone.checkpoint(process.pid)
    size = compressed.stat().st_size
    await_that('it goes on', lambda: compressed.stat().st_size > size)
    (tmp_path / 'enough').write_text('yes\n')
    assert process.wait(200) == 0, (tmp_path / 'output.errors').read_text()
    assert (tmp_path / 'output').read_text() == '0\n'
    assert result['processes'] == 5
    cores = standalone.cores(result['image'])
    assert len(cores) == 5
    assert backtraces(shutil.which('sh') or '', cores[process.pid])
    with gzip.open(compressed, 'rt') as lines:
        assert all(line == f'line {number}\n' for number, line in enumerate(lines, 1))


def test_five_checkpoints_in_a_row(program: Program, standalone: Standalone, tmp_path: Path) -> None:
    """Of the same tree, by both freezers in turn: nothing adds up in it."""
    process = program('sh', '-c', f"awk '{COUNT}' | sort -n --parallel=2 -S 1M -T . | awk '{LAST}'")
    await_that('sort has temporary files', lambda: list(tmp_path.glob('sort*')))
    maps = mapped(process.pid)
    images = [standalone.checkpoint(process.pid, '--freeze', freeze)['image']
              for freeze in ('auto', 'ptrace', 'auto', 'ptrace', 'auto')]
    assert len(set(images)) == 5
    assert mapped(process.pid) == maps
    (tmp_path / 'enough').write_text('yes\n')
    assert process.wait(200) == 0, (tmp_path / 'output.errors').read_text()
    lines, last = map(int, (tmp_path / 'output').read_text().split())
    assert lines == last > 0


def mapped(pid: int) -> list[str]:
    return Path(f'/proc/{pid}/maps').read_text().splitlines()


@pytest.mark.needs('gcc')
def test_c_program_with_100_threads(victim: Callable[..., Victim], standalone: Standalone) -> None:
    running = victim('threads')
    result = standalone.checkpoint(running.pid)
    assert result['tasks'] == 101
    core = standalone.cores(result['image'])[running.pid]
    traces = backtraces(Path(f'/proc/{running.pid}/exe').resolve(), core)
    assert len(traces) == 101
    assert sum('run (worker=' in trace for trace in traces) == 100
    assert sum('main (argc=' in trace for trace in traces) == 1
    running.finish()


@pytest.mark.needs('sqlite3')
def test_sqlite3_writing(program: Program, standalone: Standalone, tmp_path: Path) -> None:
    """In the middle of a transaction, with its locks and its journal; the statements come through a FIFO."""
    os.mkfifo(tmp_path / 'script')
    process = program('sqlite3', '-batch', 'data.db', '.read script')
    with (tmp_path / 'script').open('w', buffering=1) as script:
        script.write('create table t(n integer primary key, v text);\npragma cache_size = 10;\n')
        script.writelines(f'insert into t values({number}, hex(randomblob(200)));\n' for number in range(20))
        script.write('begin;\n')
        script.writelines(f'insert into t values({number}, hex(randomblob(200)));\n' for number in range(20, 2000))
        script.write('.shell touch here\n')
        await_that('sqlite3 is in the transaction', (tmp_path / 'here').exists)
        assert (tmp_path / 'data.db-journal').exists()
        assert locked_out(tmp_path)     # what did not fit into its cache is in the file already
        result = standalone.checkpoint(process.pid)
        assert locked_out(tmp_path)
        script.writelines(f'insert into t values({number}, hex(randomblob(200)));\n' for number in range(2000, 3000))
        script.write('commit;\npragma integrity_check;\nselect count(*), sum(n) from t;\n')
    assert process.wait(200) == 0, (tmp_path / 'output.errors').read_text()
    assert (tmp_path / 'output').read_text().splitlines() == ['ok', f'3000|{sum(range(3000))}']
    core = standalone.cores(result['image'])[process.pid]
    assert len(backtraces(shutil.which('sqlite3') or '', core)) == 1


def locked_out(directory: Path) -> bool:
    """Whether another process finds the database locked."""
    done = subprocess.run(['sqlite3', '-batch', 'data.db', 'select count(*) from t;'], cwd=directory,
                          capture_output=True, text=True, check=False)
    return done.returncode != 0 and 'locked' in done.stderr


def test_sort_of_a_large_file(program: Program, standalone: Standalone, tmp_path: Path) -> None:
    """Threads, a large heap, temporary files that sort merges and deletes."""
    numbers = random.Random(1).sample(range(10**9), 500_000)
    os.mkfifo(tmp_path / 'numbers')
    process = program('sort', '-n', '-S', '4M', '--parallel=2', '-T', '.', 'numbers', output='sorted')
    with (tmp_path / 'numbers').open('w') as file:
        file.writelines(f'{number}\n' for number in numbers[:400_000])
        file.flush()
        await_that('sort has temporary files', lambda: list(tmp_path.glob('sort*')))
        result = standalone.checkpoint(process.pid)
        file.writelines(f'{number}\n' for number in numbers[400_000:])
    assert process.wait(200) == 0, (tmp_path / 'sorted.errors').read_text()
    with (tmp_path / 'sorted').open() as lines:
        assert [int(line) for line in lines] == sorted(numbers)
    core = standalone.cores(result['image'])[process.pid]
    assert backtraces(shutil.which('sort') or '', core)


def test_what_gdb_debugs(program: Program, spool: Path, tmp_path: Path) -> None:
    """It is refused with the name of the tracer, and gdb goes on."""
    debugger = program('gdb', '--batch', '-nx', '-iex', 'set debuginfod enabled off', '-iex',
                       'set startup-with-shell off', '-ex', 'starti', '-ex', 'shell touch stopped', '-ex',
                       'shell while [ ! -e enough ]; do sleep 0.1; done', '-ex', 'continue', '--args', 'true')
    await_that('the program has stopped', (tmp_path / 'stopped').exists)
    [inferior] = [pid for pid in family(debugger.pid) if Path(f'/proc/{pid}/comm').read_text() == 'true\n']
    for command in (['check'], ['checkpoint', '--kill']):
        done = subprocess.run([sys.executable, '-m', 'ckptd.cli', *command, str(inferior), '--standalone', '--spool',
                               spool], capture_output=True, text=True, check=False)
        assert f'is traced by gdb[{debugger.pid}]' in done.stdout + done.stderr
        assert done.returncode == 3, done.stdout + done.stderr
    assert not list(spool.glob('20*'))
    (tmp_path / 'enough').touch()
    assert debugger.wait(60) == 0
    assert 'exited normally' in (tmp_path / 'output').read_text()
