# SPDX-License-Identifier: LGPL-2.1-or-later
"""What becomes of a target between the moments at which it is looked at: the kernel is asked again once it stands
still."""

import asyncio
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from ckptd.bus.client import connect
from ckptd.bus.names import BUS_NAME, MANAGER, ROOT
from ckptd.kernel.cgroup import Cgroup
from ckptd.kernel.status import read_status
from ckptd.kernel.task import read_cgroup2
from tests.daemon.test_callers import NOBODY, Busctl
from tests.lib.bus import PrivateBus, Served
from tests.worker.faulty import Api, Gate

pytestmark = pytest.mark.needs('root', 'cgroup2', 'ptrace', 'dbus', 'busctl')

# waits for a signal, then becomes the program in its first argument
PROGRAM = 'trap "exec $0" USR1; echo; while :; do sleep 0.05; done'


@pytest.fixture
def setuid_program() -> Iterator[Path]:
    """A copy of a program that anybody may start as root."""
    with tempfile.TemporaryDirectory(dir='/var/tmp') as name:
        Path(name).chmod(0o755)
        path = Path(name, 'wait')
        source = Path(name, 'wait.c')
        source.write_text('#include <unistd.h>\nint main(void) { for (;;) pause(); }\n')
        subprocess.run(['gcc', '-o', path, source], check=True)
        path.chmod(0o4755)
        yield path


@pytest.fixture
def victim(setuid_program: Path) -> Iterator['subprocess.Popen[bytes]']:
    with subprocess.Popen(['bash', '-c', PROGRAM, str(setuid_program)], user=NOBODY, group=NOBODY, extra_groups=[],
                          cwd='/', stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b'\n'
        yield process
        process.kill()


@pytest.fixture
async def gate() -> AsyncIterator[Gate]:
    made = Gate()
    yield made
    made.close()


def is_root(pid: int) -> bool:
    return read_status(pid).uids[1] == 0


@pytest.mark.needs('gcc')
@pytest.mark.parametrize('point', ['resolved', 'scanned'])
async def test_a_target_that_becomes_another_ones(point: str, private_bus: PrivateBus, gate: Gate, tmp_path: Path,
                                                  victim: 'subprocess.Popen[bytes]') -> None:
    """It runs a program with set-user-ID after the daemon found that it is all the caller's."""
    spool = tmp_path / 'spool'
    with Served(private_bus.address, tmp_path, spool, env=gate.environment):
        nobody = Busctl(private_bus, NOBODY)
        async with await connect(private_bus.address) as client, client.signals(BUS_NAME, ROOT) as signals:
            call = asyncio.ensure_future(asyncio.to_thread(
                nobody.call, MANAGER, 'Checkpoint', 'sa{sv}', f'pid:{victim.pid}', '1', 'detach', 'b', 'true'))
            async with asyncio.timeout(20):
                standing = await gate.stand(point)
            with standing:
                victim.send_signal(signal.SIGUSR1)
                async with asyncio.timeout(20):
                    while not is_root(victim.pid):      # noqa: ASYNC110 - nobody tells
                        await asyncio.sleep(0.01)
                standing.answer()
                async with gate.open():
                    [job] = await call
                    shown = await Api(client, signals).ended(job)
        assert shown['State'] == 'failed'
        assert 'PermissionDenied' in shown['Error']['name'] or 'TreeChanged' in shown['Error']['name'], shown['Error']
    assert [path.name for path in spool.iterdir()] == []
    assert not Cgroup.named(read_cgroup2(victim.pid)).frozen
    await asyncio.get_running_loop().shutdown_default_executor()
