# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which cgroups are units, in directories laid out as systemd does it."""

import errno
from pathlib import Path

import pytest

from ckptd.kernel.cgroup import CgroupMount
from ckptd.kernel.units import find_unit, system_root, unit_directories, units_of

USER = 'user.slice/user-1000.slice/user@1000.service'


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)


def found(root: Path, unit: str) -> list[str]:
    return [str(path.relative_to(root)) for path in find_unit(root, unit)]


def first_process_is_in(monkeypatch: pytest.MonkeyPatch, cgroup: str | OSError) -> None:
    def read(pid: int) -> str:
        assert pid == 1
        if isinstance(cgroup, OSError):
            raise cgroup
        return cgroup
    monkeypatch.setattr('ckptd.kernel.units.read_cgroup2', read)


@pytest.mark.parametrize('unit', [
    'init.scope', 'system.slice/a.service', 'system.slice/system-getty.slice/a@1.service', 'user.slice/user-7.slice',
    'user.slice/user-7.slice/session-2.scope', 'a.mount', 'system.slice/systemd-journald.socket'])
def test_a_unit_is_in_slices(tmp_path: Path, unit: str) -> None:
    make(tmp_path, unit)
    assert found(tmp_path, Path(unit).name) == [unit]


@pytest.mark.parametrize('elsewhere', [
    f'{USER}/a.service', f'{USER}/app.slice/a.service', f'{USER}/system.slice/a.service',
    'user.slice/user-1000.slice/session-2.scope/a.service', 'system.slice/docker.service/b.slice/a.service',
    'machine.slice/machine-b.scope/payload/system.slice/a.service', 'visitors/a.service', 'system.slice/x/a.service'])
def test_what_is_below_a_unit_is_none(tmp_path: Path, elsewhere: str) -> None:
    """Whoever has a cgroup of his own calls what is in it as he likes: that hides no unit and stands for none."""
    make(tmp_path, elsewhere)
    assert found(tmp_path, 'a.service') == []
    make(tmp_path, 'system.slice/a.service')
    assert found(tmp_path, 'a.service') == ['system.slice/a.service']


@pytest.mark.parametrize(('unit', 'directory'), [
    ('memory.service', '_memory.service'), ('cgroup.slice', '_cgroup.slice'), ('_a.service', '__a.service')])
def test_escaped_names(tmp_path: Path, unit: str, directory: str) -> None:
    make(tmp_path, directory)
    assert found(tmp_path, unit) == [directory]
    assert found(tmp_path, directory) == []


def test_units_of_an_escaped_slice(tmp_path: Path) -> None:
    make(tmp_path, '_cpu.slice/a.service')
    assert found(tmp_path, 'a.service') == ['_cpu.slice/a.service']


def test_a_file_or_a_link_is_no_cgroup(tmp_path: Path) -> None:
    make(tmp_path, 'a.service')
    (tmp_path / 'memory.swap').touch()
    (tmp_path / 'b.slice').symlink_to(tmp_path)
    assert found(tmp_path, 'memory.swap') == []
    assert found(tmp_path, 'a.service') == ['a.service']


@pytest.mark.parametrize(('cgroup', 'root'), [
    ('/init.scope', ''), ('/system.slice/docker-1.scope/init.scope', 'system.slice/docker-1.scope'), ('/', ''),
    ('/system.slice/docker-1.scope', ''), ('', ''), (ProcessLookupError(errno.ESRCH, 'hidden'), ''),
    (PermissionError(errno.EPERM, 'hidden'), '')])
def test_where_the_systems_manager_begins(monkeypatch: pytest.MonkeyPatch, cgroup: str | OSError, root: str) -> None:
    first_process_is_in(monkeypatch, cgroup)
    assert system_root(CgroupMount(Path('/mnt'), '/')) == Path('/mnt', root)


@pytest.mark.parametrize('cgroup', ['/../../init.scope', '/box/../init.scope', '/elsewhere/init.scope'])
def test_a_manager_that_the_mount_does_not_show(monkeypatch: pytest.MonkeyPatch, cgroup: str) -> None:
    first_process_is_in(monkeypatch, cgroup)
    mount = CgroupMount(Path('/mnt'), '/box')
    with pytest.raises(FileNotFoundError):
        system_root(mount)
    assert unit_directories(mount, 0, 'a.service') == []


@pytest.mark.parametrize('prefix', ['', 'box'])
def test_each_manager_has_its_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    first_process_is_in(monkeypatch, f'/{prefix}/init.scope' if prefix else '/init.scope')
    theirs = 'user.slice/user-1001.slice/user@1001.service'
    # a user that the first one plays in his own subtree is not that user
    make(tmp_path / prefix, 'system.slice/a.service', 'system.slice/b.service', f'{USER}/app.slice/a.service',
         f'{USER}/{theirs}/app.slice/b.service')

    def of(uid: int, unit: str) -> list[str]:
        return [str(path.relative_to(tmp_path / prefix))
                for path in unit_directories(CgroupMount(tmp_path, '/'), uid, unit)]
    assert of(0, 'a.service') == ['system.slice/a.service']
    assert of(1000, 'a.service') == [f'{USER}/app.slice/a.service']
    assert of(1000, 'b.service') == of(1001, 'b.service') == []
    assert of(0, 'user@1001.service') == []


@pytest.mark.parametrize(('cgroup', 'uid', 'units'), [
    ('/system.slice/a.service', 0, ('system.slice', 'a.service')),
    ('/system.slice/a.service/b.service', 0, ('system.slice', 'a.service')),
    ('/system.slice/_cgroup.service', 0, ('system.slice', 'cgroup.service')),
    (f'/{USER}/ssh.service/user-7.slice', 0, ('user.slice', 'user-1000.slice', 'user@1000.service')),
    (f'/{USER}/app.slice/a.service/b.service', 1000, ('app.slice', 'a.service')),
    (f'/{USER}/app.slice/a.service', 1001, ()), ('/system.slice/a.service', 1000, ()), ('/', 0, ()),
    ('/user.slice/user-1001.slice/user@1000.service/a.service', 1001, ())])
@pytest.mark.parametrize('prefix', ['', '/box'])
def test_units_that_a_cgroup_is_in(monkeypatch: pytest.MonkeyPatch, prefix: str, cgroup: str, uid: int,
                                   units: tuple[str, ...]) -> None:
    first_process_is_in(monkeypatch, f'{prefix}/init.scope')
    assert units_of(f'{prefix}{cgroup}', uid) == units
    assert units_of(f'/other{cgroup}', uid) == () or not prefix
