# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random messages (tests/daemon/fuzzer.py) to a daemon of root on a bus with the policy of a system bus, by root and
several users at once. Each is answered by a value or by an error; afterwards the daemon is as it was.

Every sender has a process of its own that it may name.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from tests.daemon.aftermath import check, idle, tidied
from tests.fuzz.looking import Report
from tests.jobs.test_spool import write_image
from tests.lib.bus import ROOT, Served
from tests.lib.systembus import USERS, SystemBus

SENDERS = (*USERS.values(), 0)
IMAGES = 10             # of each user


def flood(count: int, seed: int) -> Report:
    """Send so many messages to a daemon of its own."""
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='ckptd-fuzz-')))
        base.chmod(0o711)
        bus = stack.enter_context(SystemBus(base))
        (base / 'spool').mkdir(mode=0o700)
        for uid in [*USERS.values()] * IMAGES:
            write_image(base / 'spool', uid)
        daemon = stack.enter_context(Served(bus.address, base, base / 'spool'))
        victims = {uid: _sleeper(uid, stack) for uid in SENDERS}
        asyncio.run(tidied(daemon, victims[0]))
        before = idle(daemon.pid)
        report = _send(daemon, victims, count, seed)
        try:
            asyncio.run(tidied(daemon, victims[0]))
            check(daemon, before, f'seed {seed}')
        except AssertionError as error:
            report.findings.append(f'afterwards: {error}')
        return report


def _sleeper(uid: int, stack: ExitStack) -> int:
    """The pid of a process of that user. It is waited for at the end: even dead it keeps its number."""
    process = subprocess.Popen(['/bin/sleep', '100000'], cwd='/', user=uid, group=uid, extra_groups=[],
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process.pid


def _send(daemon: Served, victims: dict[int, int], count: int, seed: int) -> Report:
    running = []
    for nth, uid in enumerate(SENDERS):
        share = len(range(nth, count, len(SENDERS)))
        running.append(subprocess.Popen(
            [sys.executable, '-m', 'tests.daemon.fuzzer', daemon.address, f'{seed}/{uid}', str(share), str(uid),
             str(victims[uid])], cwd=ROOT, stdout=subprocess.PIPE, text=True))
    counts: Counter[str] = Counter()
    findings: list[str] = []
    for process in running:
        said, _ = process.communicate()
        if process.returncode:
            findings.append(f'a client ended with {process.returncode}')
            continue
        tally = json.loads(said)
        counts['sent'] += sum(tally['sent'].values())
        counts.update({name.rpartition('.')[2] or 'answer': number for name, number in tally['answers'].items()})
        findings += tally['wrong']
    return Report(counts, findings)
