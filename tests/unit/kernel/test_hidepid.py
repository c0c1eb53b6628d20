# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a mount of /proc hides, from its line in mountinfo."""

import os

import pytest

from ckptd.kernel.hidepid import Hiding, is_hidden_from, parse_hiding
from ckptd.kernel.mountinfo import parse_mountinfo, read_mountinfo

ROOT = '22 1 254:0 / / rw - ext4 /dev/vda rw\n'
PROC = '24 22 0:22 / /proc rw,nosuid,nodev,noexec,relatime shared:5 - proc proc {}\n'


@pytest.mark.parametrize(('options', 'hiding'), [
    ('rw', Hiding(0)), ('rw,hidepid=off', Hiding(0)), ('rw,hidepid=0', Hiding(0)),
    ('rw,hidepid=noaccess', Hiding(1)), ('rw,hidepid=1', Hiding(1)),
    ('rw,gid=27,hidepid=invisible', Hiding(2, 27)), ('rw,hidepid=2', Hiding(2)),
    ('rw,gid=27,hidepid=ptraceable,subset=pid', Hiding(4, 27)), ('rw,hidepid=4', Hiding(4)),
])
def test_captured(options: str, hiding: Hiding) -> None:
    assert parse_hiding(parse_mountinfo((ROOT + PROC.format(options)).encode())) == hiding


@pytest.mark.parametrize(('hiding', 'groups', 'concerned'), [
    (Hiding(0), {5}, False), (Hiding(1), {5}, True), (Hiding(2), {5}, True), (Hiding(2, 27), {5}, True),
    (Hiding(2, 27), {5, 27}, False), (Hiding(1), {0}, False), (Hiding(4, 27), {27}, True), (Hiding(4), {0}, True),
])
def test_whom_it_concerns(hiding: Hiding, groups: set[int], concerned: bool) -> None:
    """The kernel's default of gid= is 0, so members of group 0 are exempt where nothing else is said."""
    assert hiding.concerns(groups) == concerned


def test_of_several_mounts_the_last_is_seen() -> None:
    lines = ROOT + PROC.format('rw,hidepid=2') + PROC.format('rw').replace('24 22', '25 24')
    assert parse_hiding(parse_mountinfo(lines.encode())).level == 0


@pytest.mark.parametrize('lines', [ROOT, ROOT + PROC.format('rw') + '30 24 0:9 / /proc rw - tmpfs none rw\n'])
def test_without_a_proc_nobody_is_seen(lines: str) -> None:
    assert parse_hiding(parse_mountinfo(lines.encode())) == Hiding(4)


def test_a_process_that_is_gone() -> None:
    """What the machine hides is hidden all the same."""
    machine = parse_hiding(read_mountinfo()).concerns(())
    assert is_hidden_from((), 0, 0) == is_hidden_from((), os.getpid(), 1) == machine
