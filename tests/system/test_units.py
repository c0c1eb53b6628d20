# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `make install` puts in place: complete, in the right places, and clean in the eyes of systemd's own tools."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.system.container import ROOT, Container

EXPECTED = {
    'usr/bin/ckptd', 'usr/bin/ckptctl', 'usr/lib/systemd/system/ckptd.service', 'usr/lib/systemd/user/ckptd.service',
    'usr/lib/tmpfiles.d/ckptd.conf', 'usr/share/dbus-1/system.d/org.ckptd1.conf',
    'usr/share/dbus-1/system-services/org.ckptd1.service', 'usr/share/dbus-1/services/org.ckptd1.service',
    'usr/share/dbus-1/interfaces/org.ckptd1.Manager.xml', 'usr/share/bash-completion/completions/ckptctl',
    'usr/share/doc/ckptd/README.md', 'usr/share/doc/ckptd/LICENSE',
    'usr/share/doc/ckptd/examples/checkpoint-before-stop.conf', 'usr/share/polkit-1/actions/org.ckptd1.policy',
    'usr/share/doc/ckptd/examples/50-ckptd.rules', 'usr/share/doc/ckptd/security.md',
    *(f'usr/share/man/man{page.stem[-1]}/{page.stem}' for page in ROOT.glob('docs/*.[1-8].md')),
}
MAX_EXPOSURE = 5.0
# images of Ubuntu without manuals divert man(1) to a script that says so
MAN = shutil.which('man.REAL') or 'man'


def files_of(stage: Path) -> set[str]:
    """Installed files, without those of the private tree."""
    found = {str(path.relative_to(stage)) for path in stage.rglob('*') if not path.is_dir() or path.is_symlink()}
    return {name for name in found if not name.startswith('usr/lib/ckptd/')}


def test_install_puts_everything_in_place(installed: Path) -> None:
    assert files_of(installed) >= EXPECTED
    for name in ('usr/bin/ckptd', 'usr/bin/ckptctl'):
        assert os.access(installed / name, os.X_OK)


def test_nothing_installed_names_the_stage(installed: Path) -> None:
    done = subprocess.run(['grep', '-rlF', str(installed), str(installed)], capture_output=True, text=True, check=False)
    assert done.stdout == ''


@pytest.mark.needs('man')
@pytest.mark.parametrize('name', ['ckptctl', 'ckptd', 'org.ckptd1', 'ckptd-restore-limits', 'ckptd-objects'])
def test_man_finds_the_manuals(installed: Path, name: str) -> None:
    done = subprocess.run([MAN, '-M', installed / 'usr/share/man', name], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f'{name.upper()}(')


def test_prefix_and_uninstall(tmp_path: Path) -> None:
    """Another PREFIX is named in units and activation files, policy goes where a bus looks, and uninstall leaves
    nothing."""
    make = ['make', '--no-print-directory', '-s', f'DESTDIR={tmp_path}', 'PREFIX=/opt/ckptd']
    subprocess.run([*make, 'install'], cwd=ROOT, check=True, capture_output=True)
    unit = (tmp_path / 'opt/ckptd/lib/systemd/system/ckptd.service').read_text()
    assert 'ExecStart=/opt/ckptd/bin/ckptd --system' in unit
    assert '/usr/bin/ckpt' not in unit
    activation = (tmp_path / 'opt/ckptd/share/dbus-1/system-services/org.ckptd1.service').read_text()
    assert 'Exec=/opt/ckptd/bin/ckptd --system' in activation
    assert (tmp_path / 'etc/dbus-1/system.d/org.ckptd1.conf').exists()
    subprocess.run([*make, 'uninstall'], cwd=ROOT, check=True, capture_output=True)
    assert [path for path in tmp_path.rglob('*') if not path.is_dir()] == []


@pytest.mark.needs('systemd', 'systemd-analyze', 'man')
@pytest.mark.parametrize(('unit', 'scope'), [
    ('/usr/lib/systemd/system/ckptd.service', '--system'),
    ('/usr/lib/systemd/user/ckptd.service', '--user'),
    ('hooked.service', '--system'),
])
def test_systemd_analyze_verify_is_clean(machine: Container, unit: str, scope: str) -> None:
    done = machine.run('env', 'XDG_RUNTIME_DIR=/run', 'systemd-analyze', scope, 'verify', unit)
    assert (done.stdout, done.stderr) == ('', '')


@pytest.mark.needs('systemd', 'systemd-analyze')
def test_sandbox_is_as_tight_as_it_can_be(machine: Container) -> None:
    done = machine.run('systemd-analyze', 'security', '--json=short', '--no-pager', 'ckptd.service')
    assert json.loads(done.stdout)
    overall = machine.run('systemd-analyze', 'security', '--no-pager', f'--threshold={MAX_EXPOSURE * 10:.0f}',
                          'ckptd.service', check=False)
    assert overall.returncode == 0, overall.stdout


@pytest.mark.needs('systemd')
def test_tmpfiles_make_a_private_spool(machine: Container) -> None:
    machine.run('systemd-tmpfiles', '--create', 'ckptd.conf')
    assert machine.output('stat', '--format=%a %U %G', '/var/spool/ckptd') == '700 root root'
