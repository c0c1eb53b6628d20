# SPDX-License-Identifier: LGPL-2.1-or-later
"""Policies for peers outside of the tree: their texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import InvalidArgument
from ckptd.external import (
    ACTIONS,
    ANY,
    Policies,
    Policy,
    parse,
    parse_inherited,
    parse_what,
    tcp_peer,
    udp_peer,
    unix_peer,
)

NAMES = st.binary(min_size=1, max_size=107).filter(lambda name: name[0] not in b'/@:')
UNIX = st.one_of(NAMES.map(lambda name: unix_peer(b'\0' + name)),
                 NAMES.filter(lambda name: 0 not in name).map(lambda name: unix_peer(b'/' + name)))
TCP = st.builds(lambda address, port: tcp_peer(str(address), port), st.ip_addresses(), st.integers(1, 65535))
PIPE = st.integers(0, 1 << 63).map(lambda inode: f'pipe:[{inode}]')
UDP = st.builds(lambda address, port: udp_peer(str(address), port), st.ip_addresses(), st.integers(1, 65535))
POLICIES = st.one_of(st.builds(Policy, st.one_of(PIPE, UDP), st.just('inherit')),
                     st.builds(Policy, UNIX, st.sampled_from([one for one in ACTIONS if one != 'keep'])),
                     st.builds(Policy, st.just(ANY), st.sampled_from(ACTIONS)),
                     st.builds(Policy, TCP, st.sampled_from([one for one in ACTIONS if one != 'reconnect'])))


@given(POLICIES)
def test_a_policy_is_its_text(policy: Policy) -> None:
    assert parse(str(policy)) == policy


@given(st.text())
def test_any_text_is_a_policy_or_an_error(text: str) -> None:
    try:
        policy = parse(text)
    except InvalidArgument:
        return
    assert parse(str(policy)) == policy


@pytest.mark.parametrize(('text', 'what'), [
    ('tcp:127.0.0.1:80', 'tcp:127.0.0.1:80'), ('tcp:::1:80', 'tcp:[::1]:80'),
    ('tcp:[2001:db8:0::1]:080', 'tcp:[2001:db8::1]:80'), ('/run/a:b', '/run/a:b'), ('@a', '@a'), ('any', 'any')])
def test_one_spelling(text: str, what: str) -> None:
    assert parse_what(text) == what


@pytest.mark.parametrize('text', [
    '', ':', '/run/a', '/run/a:stay', 'run/a:close', '/:close', '@:close', ':close', 'tcp:127.0.0.1:close',
    'tcp:127.0.0.1:0:close', 'tcp:127.0.0.1:65536:close', 'tcp:host:80:close', 'tcp:127.0.0.1:80:reconnect',
    '/run/a:keep', '@a:keep', 'udp:127.0.0.1:80:close', 'udp:127.0.0.1:inherit',
    'pipe:[1]:close', 'pipe:[]:inherit', 'pipe:[-1]:inherit', 'pipe:1:inherit',
    f'/{"a" * 600}:close', '/a\0b:close', 'anyone:close'])
def test_what_is_no_policy(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse(text)


@given(st.one_of(UNIX, TCP, UDP, PIPE, st.just(ANY)), st.integers(0, 999_999_999))
def test_a_peer_and_a_file_descriptor(what: str, fd: int) -> None:
    assert parse_inherited(f'{what}={fd}') == (what, fd)


@pytest.mark.parametrize('text', ['', '=', 'any', 'any=', '=3', 'any=-1', 'any=x', 'any=3.0', 'any=9999999999', 'x=3'])
def test_what_is_no_peer_with_a_file_descriptor(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_inherited(text)


def test_the_later_and_the_exact_one_counts() -> None:
    policies = Policies.parse(['/run/a:close', 'any:inherit', '/run/a:reconnect'])
    assert policies.action_of('/run/a') == 'reconnect'
    assert policies.action_of('') == policies.action_of('@b') == 'inherit'
    assert Policies().action_of('/run/a') == 'refuse'
