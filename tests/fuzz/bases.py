# SPDX-License-Identifier: LGPL-2.1-or-later
"""An ordinary user with a process that asks, and images of trees of theirs: what crafted images are made from."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ckptd.kernel.bounds import read_bounds
from ckptd.kernel.stat import read_stat
from ckptd.kernel.status import read_status
from ckptd.protocol.requests import Caller
from tests.lib import settled
from tests.lib.gate import own_cgroup
from tests.lib.mutate import Mutable
from tests.lib.victim import VICTIMS, build
from tests.security.attacker import PYTHON, Attacker
from tests.worker.driver import Place, place_of

UID = 61001         # alice, see tests/lib/systembus.py
# victims: between them they have every record, and every kind of open file
ALL = ('aio_rings', 'attributes', 'events', 'files', 'headless', 'inotify', 'interrupted', 'io_urings', 'locks',
       'memory', 'pipes', 'registers', 'shared', 'sharing', 'signals', 'stopped', 'terminals', 'timers', 'tree')
FEW = ('events', 'files', 'headless', 'memory', 'timers')


@dataclass
class User:
    """The user, and where things of a fuzz run are. cgroup: of the asker, and below it of all that is restored."""
    attacker: Attacker
    place: Place
    asker: int
    cgroup: Path | None

    @property
    def caller(self) -> Caller:
        """As a daemon sees the asker, and what bounds it."""
        start_time = read_stat(self.asker).start_time
        return Caller(UID, UID, (UID,), self.asker, 0, read_status(os.getpid()).cap_bnd, start_time=start_time,
                      bounds=read_bounds(self.asker, start_time, UID))

    def image(self, name: str) -> Mutable:
        """The image of a victim, which is dead."""
        program = Path(shutil.copy(build(name), self.attacker.home))
        shutil.copy(VICTIMS / 'victim.py', self.attacker.home)      # what a script imports
        argv: Sequence[str | Path] = (program,) if program.suffix != '.py' else (PYTHON, program)
        tree = self.attacker.start('', argv=tuple(argv))
        image = self.place.checkpoint(tree.pid, forked=True, caller=self.caller, after='kill')
        tree.close()
        return Mutable.read(image)

    @contextmanager
    def images(self, names: Sequence[str]) -> Iterator[list[Mutable]]:
        """The same of several, open."""
        with ExitStack() as stack:
            found = []
            for name in names:
                found.append(self.image(name))
                stack.callback(found[-1].close)
            yield found

    def running(self) -> list[int]:
        """All processes in the cgroups, but for the asker."""
        if self.cgroup is None:
            return []
        found = [int(pid) for path in self.cgroup.rglob('cgroup.procs') for pid in path.read_text().split()]
        return [pid for pid in found if pid != self.asker]

    def end_all(self) -> None:
        """Kill and reap what was restored."""
        while pids := self.running():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            settled.reap_orphans()
        settled.reap_orphans()


@contextmanager
def user_in(directory: Path | None = None) -> Iterator[User]:
    """The user, who leaves nothing."""
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='ckptd-fuzz-', dir=directory)))
        home = stack.enter_context(place_of(UID))
        own, group = own_cgroup(), None
        if own is not None:
            group = own / f'fuzz-{os.getpid()}'
            group.mkdir()
            stack.callback(settled.remove_cgroup, group)
        asker = subprocess.Popen(['/bin/sleep', '100000'], cwd='/', user=UID, group=UID, extra_groups=[UID],
                                 stdin=subprocess.DEVNULL, start_new_session=True)
        stack.callback(asker.wait)
        stack.callback(asker.kill)
        if group is not None:
            (group / 'cgroup.procs').write_text(str(asker.pid))
        attacker = Attacker('alice', UID, (UID,), home, '')
        stack.callback(attacker.close)
        user = User(attacker, Place(base).make(), asker.pid, group)
        stack.callback(user.end_all)
        yield user
