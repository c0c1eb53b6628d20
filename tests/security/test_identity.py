# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who a restored tree is: whoever asked for it, with the groups, keys and audit identity of that user."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lib.bus import Served
from tests.security.attacker import Attacker, Program, refused, status
from tests.security.conftest import GROUP
from tests.security.keyring import KEY, KEY_SPEC_SESSION_KEYRING, KEYCTL_SEARCH, NR_KEYCTL, join_session_keyring

# ---------------------------------------------------------------- groups

READER = """
ready()
while True:
    wait_for_go()
    try:
        say(open({!r}).read())
    except OSError as error:
        say(error.strerror)
"""
DENIED = 'Permission denied'


@pytest.fixture
def kept_from_group(attacker: Attacker) -> Path:
    """A file that everybody may read but the members of one group."""
    path = attacker.home.parent / 'kept'
    path.write_text('a secret')
    os.chown(path, 0, GROUP)
    path.chmod(0o604)
    return path


def test_an_import_takes_no_group_away(served: Served, attacker: Attacker, kept_from_group: Path) -> None:
    """A group may be what denies access, so fewer groups are more rights."""
    program = attacker.start(READER.format(str(kept_from_group)))
    assert program.ask() == DENIED
    image = attacker.take(program)
    assert image.alter('Credentials', groups=()) == 1
    outcome = attacker.restore(image)
    if not refused(outcome):
        assert set(status(outcome.root)['Groups'].split()) == {str(attacker.uid), str(GROUP)}
        assert program.ask() == DENIED


def test_the_groups_are_those_of_now(served: Served, attacker: Attacker, kept_from_group: Path) -> None:
    """The program began before its user was a member."""
    groups, attacker.groups = attacker.groups, (attacker.uid,)
    program = attacker.start(READER.format(str(kept_from_group)))
    image = attacker.checkpoint(program)
    attacker.groups = groups
    outcome = attacker.restore(image)
    if not refused(outcome):
        assert program.ask() == DENIED


# ---------------------------------------------------------------- session keyrings

SEARCHER = f"""
ready()
while True:
    wait_for_go()
    try:
        say(call({NR_KEYCTL}, {KEYCTL_SEARCH}, {KEY_SPEC_SESSION_KEYRING}, b'user', {KEY!r}, 0))
    except OSError as error:
        say(error.strerror)
"""
NO_KEY = 'Required key not available'


@pytest.mark.needs('keyrings')
def test_the_keys_of_the_daemon_are_not_the_trees(serve: Callable[..., Served], attacker: Attacker) -> None:
    """What is in a session keyring is in reach of everybody who has that keyring, whatever their ids."""
    serve(module='tests.security.keyed')
    attacker.before.append(join_session_keyring)
    program = attacker.start(SEARCHER)
    assert program.ask() == NO_KEY
    outcome = attacker.restore(attacker.checkpoint(program))
    assert outcome.root, outcome.words
    assert program.ask() == NO_KEY


# ---------------------------------------------------------------- the audit's login uid

LOGIN = """
ready()
wait_for_go()
try:
    os.write(os.open('/proc/self/loginuid', os.O_WRONLY), b'0')
    say('written')
except OSError as error:
    say(error.strerror)
rest()
"""


@pytest.fixture
def logged_in(attacker: Attacker) -> Program:
    """A program of a session that pam_loginuid has marked."""
    attacker.before.append(lambda: Path('/proc/self/loginuid').write_text(str(attacker.uid)))
    return attacker.start(LOGIN)


@pytest.mark.needs('audit')
def test_the_login_uid_is_the_askers(served: Served, attacker: Attacker, logged_in: Program) -> None:
    """Whoever has none may choose one, and the audit log would name somebody else."""
    assert Path(f'/proc/{logged_in.pid}/loginuid').read_text() == str(attacker.uid)
    outcome = attacker.restore(attacker.checkpoint(logged_in))
    assert outcome.root, outcome.words
    assert Path(f'/proc/{outcome.root}/loginuid').read_text() == str(attacker.uid)
    assert logged_in.ask() == 'Operation not permitted'
