# SPDX-License-Identifier: LGPL-2.1-or-later
"""Targets: each text is one value, each value has one text."""

import subprocess

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import InvalidArgument, NoSuchTarget
from ckptd.target import (
    CALLER,
    MAX_PID,
    UNIT_TYPES,
    WITHOUT_CGROUP,
    AnyTarget,
    CgroupTarget,
    ProcessTarget,
    Target,
    UnitTarget,
    is_valid,
    parse_target,
)

LONGEST = f'{"x" * 247}.service'      # 255 characters

pids = st.integers(1, MAX_PID).map(ProcessTarget)
units = st.from_regex(rf'\A[A-Za-z0-9_.\\-]{{1,20}}(@[A-Za-z0-9:_.\\@-]{{1,20}})?\.({"|".join(UNIT_TYPES)})\Z'
                      ).map(UnitTarget)
names = st.text(st.characters(exclude_characters='/\0\n', exclude_categories=['Cs']), min_size=1, max_size=20
                ).filter(lambda name: name not in ('.', '..'))
cgroups = st.lists(names, max_size=5).map(lambda parts: CgroupTarget('/' + '/'.join(parts)))
targets = st.one_of(pids, units, cgroups)


@pytest.mark.parametrize(('text', 'target'), [
    ('pid:12', ProcessTarget(12)), ('pid:007', ProcessTarget(7)), ('self', CALLER),
    ('a.service', UnitTarget('a.service')), ('a', UnitTarget('a.service')), ('a@b', UnitTarget('a@b.service')),
    ('a@b:c.scope', UnitTarget('a@b:c.scope')), ('cgroup:/a/b/', CgroupTarget('/a/b')), ('cgroup:/', CgroupTarget('/')),
    ('cgroup://a/./b', CgroupTarget('/a/b')), ('cgroup:/...', CgroupTarget('/...')), (LONGEST, UnitTarget(LONGEST)),
])
def test_a_target_has_one_spelling(text: str, target: AnyTarget) -> None:
    assert parse_target(text) == target
    assert parse_target(str(target)) == target


@pytest.mark.parametrize('text', [
    '', 'pid:', 'pid:0', 'pid:-1', 'pid:x', 'pid: 7', 'pid:7\n', 'pid:1234567890', f'pid:{1 << 40}',
    f'pid:{"9" * 5000}', 'pid:１２', 'pid:²', 'pid:a.service',
    'cgroup:', 'cgroup:a', 'cgroup:/a/../b', 'cgroup:/..', 'cgroup:/a\0b', 'cgroup:/a\nb', f'cgroup:/{"x" * 300}',
    f'cgroup:{"/x" * 3000}',
    'a b', '/etc/passwd', '../x.service', 'a/b.scope', 'a\0.slice', 'a.service\n', 'x' * 300, f'x{LONGEST}', 'foo.bar',
    'foo.timer', 'a@.service', '@a.service', '.service', 'ä.service',
])
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(InvalidArgument, match='is not a target') as caught:
        parse_target(text)
    assert 'cgroup:/path' in caught.value.hint


def test_the_hint_says_what_is_wrong() -> None:
    for text, words in (('pid:x', 'the number N of a process'), ('cgroup:a', '/proc/PID/cgroup'),
                        ('foo.bar', 'ends in .service, .scope'), ('foo.timer', 'a timer unit has no processes')):
        with pytest.raises(InvalidArgument) as caught:
            parse_target(text)
        assert words in caught.value.hint


@given(targets)
def test_the_text_of_a_target_is_parsed_to_the_same(target: Target) -> None:
    assert is_valid(target)
    assert parse_target(str(target)) == target


@given(st.one_of(st.text(), st.text().map('cgroup:{}'.format), st.text().map('cgroup:/{}'.format),
                 st.text('0123456789').map('pid:{}'.format), st.text().map('{}.service'.format)))
def test_a_text_is_a_target_or_refused(text: str) -> None:
    try:
        target = parse_target(text)
    except InvalidArgument:
        return
    assert parse_target(str(target)) == target


@given(targets, targets)
def test_equal_targets_have_equal_texts(one: Target, other: Target) -> None:
    assert (one == other) == (str(one) == str(other))


@given(targets)
def test_a_target_survives_a_message(target: Target) -> None:
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(target), type=Target)
    assert (decoded, hash(decoded)) == (target, hash(target))


@pytest.mark.parametrize('target', [
    ProcessTarget(0), ProcessTarget(MAX_PID + 1), UnitTarget('foo.bar'), UnitTarget('a/b.service'), CgroupTarget('a'),
    UnitTarget('pid:1.service'), UnitTarget('cgroup:1.service'), CgroupTarget('/a/../b'), CgroupTarget('/a/'),
    CgroupTarget(''), CgroupTarget('//a'),
])
def test_a_message_with_a_bad_target_is_refused(target: Target) -> None:
    assert not is_valid(target)
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(target), type=Target)


def test_the_caller_is_a_process_of_the_bus() -> None:
    assert CALLER.process(7) == ProcessTarget(7)
    with pytest.raises(NoSuchTarget, match='pid of the caller'):
        CALLER.process(0)


@pytest.mark.needs('busctl')
def test_the_types_are_systemds() -> None:
    listed = subprocess.run(['systemctl', '--type=help'], capture_output=True, text=True, check=True).stdout
    assert {*UNIT_TYPES, *WITHOUT_CGROUP} == {*listed.splitlines()[1:]}


@pytest.mark.needs('systemd-analyze')
@pytest.mark.parametrize('name', [
    'a.service', 'foo.bar', 'a@b:c.scope', '@a.service', '.service', 'a b.service', r'x\x2dy.mount', 'x@y@z.service',
    'a..slice', 'ä.service', 'a+b.service', LONGEST, f'x{LONGEST}', 'a.b.swap', 'a.SERVICE', 'x:y.socket',
])
def test_systemd_knows_the_same_names(name: str) -> None:
    done = subprocess.run(['systemd-analyze', 'verify', '--man=no', name], capture_output=True, text=True, check=False)
    assert is_valid(UnitTarget(name)) == ('Failed to prepare filename' not in done.stderr)
