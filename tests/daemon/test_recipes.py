# SPDX-License-Identifier: LGPL-2.1-or-later
"""The recipes of org.ckptd1(7): each method has a line, and each line does what it says."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from ckptd.bus.interfaces import documents
from tests.lib import settled
from tests.lib.bus import ROOT, Daemon

MARK = re.compile(r'<!-- recipes: (\S+) runs this block -->\n```sh\n(.*?)```', re.DOTALL)
BLOCKS = dict(MARK.findall((ROOT / 'docs/org.ckptd1.7.md').read_text()))
OURS = BLOCKS['tests/daemon/test_recipes.py']
METHODS = {f'{interface.attrib["name"].rpartition(".")[2]}.{method.attrib["name"]}' for document in documents().values()
           for interface in ElementTree.fromstring(document) for method in interface.findall('method')}


def methods_of(line: str) -> set[str]:
    """What a line calls, 'Image.Export': with busctl, or by its comment."""
    called = {f'Manager.{name}' for name in re.findall(r'call \$manager (\w+)', line)}
    called |= {f'{interface}.{name}' for interface, name in re.findall(r'org\.ckptd1\.(Job|Image) ([A-Z]\w+)', line)
               if ' call ' in line}
    if commented := re.search(r'^[^#].*# ([A-Z]\w+)$', line):
        interface = 'Image' if commented[1] in ('Open', 'Export') else 'Manager'
        called.add(f'{interface}.{commented[1]}')
    return called


def test_every_method_has_a_line() -> None:
    called = {method for block in BLOCKS.values() for line in block.splitlines() for method in methods_of(line)}
    assert called >= METHODS


@pytest.mark.needs('root', 'ptrace', 'dbus', 'busctl')
def test_each_line(daemon: Daemon, sleeper: str, tmp_path: Path) -> None:
    """Those of methods that the daemon does not have yet are left out."""
    lines = [line for line in OURS.splitlines() if methods_of(line) <= METHODS]
    left_out = {method for line in OURS.splitlines() for method in methods_of(line) - METHODS}
    assert left_out <= {'Image.Open', 'Manager.Import', 'Manager.Inhibit', 'Manager.ListInhibitors'}
    script = '\n'.join(['set -eux', f'pid={sleeper.removeprefix("pid:")}', *lines])
    done = subprocess.run(['bash', '-c', script], capture_output=True, text=True, cwd=tmp_path, timeout=55, check=False,
                          env={**os.environ, 'DBUS_SYSTEM_BUS_ADDRESS': daemon.address, 'PYTHONPATH': str(ROOT),
                               'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'})
    assert done.returncode == 0, f'{done.stdout}{done.stderr}{daemon.log}'
    assert (tmp_path / 'cores.tar').stat().st_size > 0
    settled.reap_orphans()
