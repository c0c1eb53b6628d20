# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line, and the shell completions that know it too."""

import argparse
import importlib
import re
from pathlib import Path

import pytest

import ckptd.cli
from ckptd.cli.arguments import COMMANDS, build_parser, parse
from ckptd.cli.options import request_options, restore_options
from ckptd.errors import InvalidArgument

COMPLETION = Path(ckptd.cli.__file__).parent / 'completion'


@pytest.mark.parametrize(('text', 'target'), [
    ('1234', 'pid:1234'), ('pid:1234', 'pid:1234'), ('app.service', 'app.service'), ('cgroup:/a/b', 'cgroup:/a/b'),
    ('self', 'self'), ('007', 'pid:7')])
def test_a_bare_number_is_a_pid(text: str, target: str) -> None:
    assert parse(['checkpoint', text]).target == target


@pytest.mark.parametrize('argv', [['--json', 'list'], ['list', '--json']])
def test_common_options_stand_before_or_after_the_command(argv: list[str]) -> None:
    assert parse(argv).json


def test_common_options_before_the_command_are_not_forgotten() -> None:
    args = parse(['--standalone', '--spool', '/a', 'checkpoint', '1', '--json'])
    assert (args.standalone, args.spool, args.json, args.bus) == (True, '/a', True, 'system')


def test_what_happens_after_a_checkpoint() -> None:
    assert [parse(['checkpoint', '1', *flag]).after for flag in ([], ['--kill'], ['--leave-frozen'])] == [
        'resume', 'kill', 'freeze']


def test_a_timeout_is_a_time_span() -> None:
    assert parse(['checkpoint', '1', '--timeout', '500ms']).timeout == 500_000


def test_sizes_have_binary_prefixes() -> None:
    assert parse(['checkpoint', '1', '--save-files', '--save-limit', '64M']).save_limit == 64 << 20


@pytest.mark.parametrize(('flags', 'wishes'), [
    ([], {}), (['--detach'], {}), (['--wait', '--new-pidns'], {'wait': True, 'new_pidns': True}),
    (['--leave-stopped', '--cgroup', 'cgroup:/a/b'], {'leave_stopped': True, 'cgroup': '/a/b'}),
    (['--changed-files', 'rollback'], {'changed_files': 'rollback'})])
def test_only_what_a_restore_is_to_do_otherwise_is_asked_for(flags: list[str], wishes: dict[str, object]) -> None:
    assert restore_options(parse(['restore', 'image', *flags])) == wishes


@pytest.mark.parametrize(('flags', 'wishes'), [
    ([], {}), (['--save-files'], {'save_files': True}),
    (['--save-files', '--save-limit', '1G'], {'save_files': True, 'save_limit': 1 << 30})])
def test_files_are_saved_when_asked_to(flags: list[str], wishes: dict[str, object]) -> None:
    options = request_options(parse(['checkpoint', '1', *flags]))
    assert {name: value for name, value in options.items() if name.startswith('save')} == wishes


@pytest.mark.parametrize(('argv', 'message'), [
    ([], 'no command'),
    (['chekpoint', '1'], "unknown command 'chekpoint'"),
    (['checkpoint'], 'required: TARGET'),
    (['checkpoint', '1', '--kill', '--leave-frozen'], 'not allowed with'),
    (['checkpoint', '1', '--timeout', '3x'], 'is not a time span'),
    (['checkpoint', '1', '--freeze', 'hard'], 'invalid choice'),
    (['restore', 'image', '--wait', '--detach'], 'not allowed with'),
    (['restore', 'image', '--changed-files', 'ignore'], 'invalid choice'),
    (['restore'], 'required: IMAGE'),
    (['checkpoint', '1', '--save-limit', 'much'], 'is not a size'),
    (['list', '--nonsense'], 'unrecognized arguments: --nonsense'),
    (['list', '--spool', '/tmp'], '--spool is for --standalone'),
    (['list', '--standalone', '--user'], 'a bus of its own'),
    (['list', '--user', '--system'], 'not allowed with'),
    (['cancel', 'x'], 'invalid int'),
    (['export', 'image'], 'required: DIR')])
def test_a_wrong_command_line_is_an_error_with_a_hint(argv: list[str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(message)) as caught:
        parse(argv)
    assert caught.value.exit_status == 2
    assert caught.value.hint


def test_the_hint_of_a_wrong_option_names_the_help_of_its_command() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(['checkpoint'])
    assert caught.value.hint == 'run "ckptctl checkpoint --help"'


def test_a_misspelt_command_brings_a_proposal() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(['exprt'])
    assert caught.value.hint == 'did you mean "export"?'


@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_has_a_handler_and_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, _, function = COMMANDS[name].handler.partition(':')
    assert callable(getattr(importlib.import_module(f'ckptd.cli.{module}'), function))
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args([name, '--help'])
    assert caught.value.code == 0
    assert f'ckptctl {name}' in capsys.readouterr().out.partition('example')[2]


def options() -> dict[str, set[str]]:
    """Long options by command."""
    [commands] = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: {option for action in parser._actions for option in action.option_strings if option.startswith('--')}
            for name, parser in commands.choices.items()}


def common() -> set[str]:
    return set.intersection(*options().values())


def test_bash_completes_every_command_and_option() -> None:
    script = (COMPLETION / 'ckptctl.bash').read_text()
    words = {name: set(re.findall(rf"\[{name}\]='(.*?)'", script)) for name in COMMANDS}
    [listed] = re.findall(r"local commands='(.*)'", script)
    [shared] = re.findall(r"local common='(.*)'", script)
    assert listed.split() == list(COMMANDS)
    assert set(shared.split()) == common()
    for name, known in options().items():
        assert set(' '.join(words[name]).split()) == known - common(), name


def test_zsh_completes_every_command_and_option() -> None:
    script = (COMPLETION / '_ckptctl').read_text()
    [listed] = re.findall(r'commands=\(\n(.*?)\n {4}\)', script, re.DOTALL)
    assert re.findall(r"'(\w+):", listed) == list(COMMANDS)
    every = set.union(*options().values())
    assert {option for option in every if f'{option}[' not in script and f'{option}}}' not in script} == set()
