# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: a table of commands, and the parsers made from it.

Common options may stand before or after the name of the command. A mistake raises InvalidArgument, so that it is
reported like every other error. Handlers are given by name and not imported, so `ckptctl --help` loads nothing but
argparse.
"""

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from ckptd import __version__
from ckptd.cli.argument_types import cgroup, inherited, size, sysv, target, timespan
from ckptd.errors import InvalidArgument

FREEZE_MODES = ('auto', 'cgroup', 'unit', 'ptrace', 'caller')
CHANGED_FILES = ('refuse', 'accept', 'rollback')
FORMATS = ('core', 'tar')
COMMON_DEFAULTS = {'json': False, 'standalone': False, 'spool': None, 'address': None, 'bus': 'system',
                   'legend': True, 'all': False}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises an error instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        hint = f'run "{self.prog} --help"'
        if message.endswith('required: COMMAND'):
            message = 'no command'
        unknown = re.match(r"argument COMMAND: invalid choice: '(.*?)'", message)
        if unknown:
            message = f'unknown command {unknown[1]!r}'
            close = difflib.get_close_matches(unknown[1], COMMANDS, n=1)
            hint = f'did you mean "{close[0]}"?' if close else 'run "ckptctl --help" for the list of commands'
        raise InvalidArgument(message, hint=hint)


@dataclass(frozen=True, slots=True)
class Command:
    """One command."""
    handler: str    # 'module:coroutine' below ckptd.cli
    summary: str
    example: str    # command lines for the end of --help
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    description: str = ''


def _target(parser: argparse.ArgumentParser, metavar: str = 'TARGET') -> None:
    parser.add_argument('target', metavar=metavar, type=target,
                        help='pid:N or just N, a unit name (app.service), cgroup:/PATH, or self')


def _freezing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--freeze', choices=FREEZE_MODES, default='auto', metavar='MODE',
                        help='what stops the tree: auto (default), cgroup, unit (through systemd), ptrace, or caller '
                             '(you have already frozen it)')
    parser.add_argument('--timeout', type=timespan, metavar='SPAN',
                        help='give up when the tree is not frozen after SPAN: "10s" (default), "500ms", "2min"')


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    _target(parser)
    _freezing(parser)
    after = parser.add_mutually_exclusive_group()
    after.add_argument('--kill', dest='after', action='store_const', const='kill', default='resume',
                       help='kill the tree once its image is published')
    after.add_argument('--leave-frozen', dest='after', action='store_const', const='freeze',
                       help='keep the tree frozen afterwards, until "ckptctl thaw TARGET"')
    parser.add_argument('--force', action='store_true', help='with --kill: even if a restore would be refused')
    parser.add_argument('--save-files', action='store_true',
                        help='also save the content of files that are open for writing, for "restore --changed-files '
                             'rollback"')
    parser.add_argument('--save-limit', type=size, metavar='SIZE',
                        help='save at most SIZE of such content in all: "64M", "1G" (default)')
    _external(parser)
    _sysv(parser)
    _as_root(parser)
    parser.add_argument('--detach', action='store_true', help='print the job and return at once')
    parser.add_argument('-q', '--quiet', action='store_true', help='print only the id of the image')


def _external(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--external', action='append', default=[], metavar='WHAT:ACTION',
                        help='what becomes of a connection to a process outside of the tree; WHAT: a path, @NAME, '
                             'tcp:ADDRESS:PORT or any; ACTION: refuse (default), close, keep, reconnect or inherit')


def _sysv(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--sysv', action='extend', default=[], metavar='ID,...', type=sysv,
                        help='save these System V semaphores and message queues, too: ids (ipcs -s -q), sem:ID or '
                             'msg:ID')


def _as_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--as-root', action='store_true',
                        help="with root's rights, even if the whole tree belongs to one other user")


def _restore(parser: argparse.ArgumentParser) -> None:
    _image(parser)
    stay = parser.add_mutually_exclusive_group()
    stay.add_argument('--wait', action='store_true',
                      help='stay until the root of the tree has ended, pass on signals and the terminal, and exit with '
                           'its exit status')
    stay.add_argument('--detach', dest='wait', action='store_false',
                      help='return once the tree runs, and print the pid of its root (default)')
    parser.add_argument('--new-pidns', action='store_true',
                        help='restore into a new pid namespace, where every pid is free')
    parser.add_argument('--clamp', action='store_true',
                        help='for limits, priorities and locked memory that you may not set: use the nearest value')
    parser.add_argument('--force', action='store_true', help='restore beside another instance of the same unit')
    parser.add_argument('--cgroup', metavar='PATH', type=cgroup, help='cgroup for the tree, not its former one')
    parser.add_argument('--leave-stopped', action='store_true', help='stop every process as by SIGSTOP')
    parser.add_argument('--changed-files', choices=CHANGED_FILES, metavar='HOW',
                        help='for files that have changed since: refuse (default), accept, or rollback to their saved '
                             'content')
    parser.add_argument('--terminal', choices=('detach',), metavar='detach',
                        help='restore a tree without the terminal that it ran on: it reads end-of-file there')
    parser.add_argument('--inherit', action='append', default=[], metavar='WHAT=FD', type=inherited,
                        help='give the tree this open socket or pipe, a file descriptor of ckptctl, for its one to '
                             'WHAT, if the checkpoint had --external=WHAT:inherit')
    parser.add_argument('--dry-run', action='store_true', help='list what would prevent a restore, and change nothing')


def _check(parser: argparse.ArgumentParser) -> None:
    _target(parser)
    _external(parser)
    _sysv(parser)
    _as_root(parser)


def _thaw(parser: argparse.ArgumentParser) -> None:
    _target(parser)


def _freeze(parser: argparse.ArgumentParser) -> None:
    _target(parser)
    _freezing(parser)


def _tree(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('target', metavar='TARGET|IMAGE', type=target, help='a running tree, or the id of an image')
    parser.add_argument('--files', action='store_true', help='draw each open file on a line of its own')
    parser.add_argument('--threads', action='store_true', help='draw each thread, even if several have the same name')


def _job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('jobs', metavar='JOB', type=int, nargs='+', help='number of a job, as "ckptctl jobs" shows it')


def _image(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('image', metavar='IMAGE', help='id of an image, as "ckptctl list" shows it')


def _images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('images', metavar='IMAGE', nargs='+', help='id of an image, as "ckptctl list" shows it')


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--format', choices=FORMATS, default='core',
                        help='core: one ELF core per process (default); tar: the whole image, for "ckptctl import"')
    parser.add_argument('--force', action='store_true', help='overwrite existing files')
    _image(parser)
    parser.add_argument('directory', metavar='DIR|FILE',
                        help='directory for core.N of each process, made if needed; with --format tar the file, '
                             'or - for standard output')


def _import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('file', metavar='FILE',
                        help='file written by "ckptctl export --format tar", or - for standard input')


def _inhibit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--who', metavar='NAME', default='', help='name of the delaying program (default: PROGRAM)')
    parser.add_argument('--why', metavar='TEXT', default='a program must end first', help='reason of the delay')
    _target(parser)
    parser.add_argument('program', metavar='PROGRAM', nargs=argparse.REMAINDER, help='program to run, with its '
                        'arguments')


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--freeze', choices=('auto', 'cgroup', 'ptrace'), default='auto', metavar='MODE',
                        help='what stops the tree: auto (default), cgroup or ptrace')
    parser.add_argument('--keep', action='store_true', help='keep the spool and the cores, and print where they are')


COMMANDS: dict[str, Command] = {
    'checkpoint': Command(
        'checkpoint:checkpoint', 'Write an image of a running tree of processes',
        'ckptctl checkpoint 1234\nckptctl checkpoint app.service --kill --timeout 30s\n'
        'ckptctl checkpoint 1234 --standalone --spool ~/images --json', _checkpoint,
        'Freeze the tree below TARGET, write it to an image in the spool, and let it run on. '
        'Ctrl-C cancels: the tree runs on and nothing is left behind.'),
    'restore': Command(
        'restore:restore', 'Restore the tree of an image',
        'ckptctl restore 20240131_235959_sleep_3fa9 --dry-run\nckptctl restore 20240131_235959_sleep_3fa9\n'
        'ckptctl restore 20240131_235959_sleep_3fa9 --wait --new-pidns\n'
        'ckptctl restore 20240131_235959_sort_71c0 --standalone --spool ~/images --changed-files rollback', _restore,
        'Make every process of IMAGE again and let the tree continue where it was. No process runs before all are '
        'ready. Until then Ctrl-C cancels the restore, and nothing is left behind.'),
    'check': Command(
        'checkpoint:check', 'List what would prevent a checkpoint',
        'ckptctl check 1234\nckptctl check app.service --json', _check,
        'Run every check of a checkpoint and list everything found. Nothing is frozen and nothing is written.'),
    'tree': Command(
        'tree:tree', 'Draw a tree of processes, live or from an image',
        'ckptctl tree 1234 --files\nckptctl tree 20240131_235959_sleep_3fa9', _tree,
        'Draw the processes and threads below TARGET, or in IMAGE, with their memory and open files.'),
    'freeze': Command(
        'freeze:freeze', 'Freeze a tree and hold it',
        'ckptctl freeze app.service\nckptctl freeze 1234 --freeze ptrace --standalone', _freeze,
        'Return once every task of the tree has stopped. The daemon holds it until "ckptctl thaw". With --standalone '
        'there is no daemon to hold it: the command stays, and thaws the tree on Ctrl-C.'),
    'thaw': Command(
        'freeze:thaw', 'Thaw a frozen tree', 'ckptctl thaw app.service', _thaw,
        'Thaw a tree that "ckptctl freeze" or "ckptctl checkpoint --leave-frozen" left frozen.'),
    'jobs': Command('jobs:jobs', 'List the jobs of the daemon', 'ckptctl jobs --json'),
    'cancel': Command('jobs:cancel', 'Cancel jobs', 'ckptctl cancel 7', _job,
                      'The tree of a cancelled checkpoint runs on, and its image is removed. A restore leaves '
                      'nothing behind; if its tree already runs, the tree runs on.'),
    'list': Command('images:list_images', 'List the images in the spool', 'ckptctl list\nckptctl list --json'),
    'show': Command('images:show', 'Show the properties of an image',
                    'ckptctl show 20240131_235959_sleep_3fa9', _image),
    'verify': Command('images:verify', 'Check that images are complete and unaltered',
                      'ckptctl verify 20240131_235959_sleep_3fa9', _images,
                      'Compare every part with its digest and every record with the grammar, and list all damages.'),
    'remove': Command('images:remove', 'Remove images', 'ckptctl remove 20240131_235959_sleep_3fa9', _images),
    'export': Command(
        'export:export', 'Write ELF cores of an image, or the image itself',
        'ckptctl export --format core 20240131_235959_sleep_3fa9 cores\ngdb /usr/bin/sleep cores/core.1234\n'
        'ckptctl export --format tar 20240131_235959_sleep_3fa9 sleep.tar', _export,
        'Write one ELF core per process to DIR, as core.N with N its pid, for gdb and other debuggers; or the image as '
        'a tar archive.'),
    'import': Command(
        'archive:import_', 'Import an image from a file', 'ckptctl import sleep.tar', _import,
        'The whole image is checked first, and then it becomes yours. A tree restored from it has no right that you '
        'lack.'),
    'inhibit': Command(
        'inhibit:inhibit', 'Run a program and delay checkpoints meanwhile', 'ckptctl inhibit app.service flush-queues',
        _inhibit, 'While PROGRAM runs, a checkpoint of TARGET waits, but not longer than the daemon allows '
        '(InhibitDelayMaxSec=, 5 s by default).'),
    'inhibitors': Command('inhibit:inhibitors', 'List what delays checkpoints', 'ckptctl inhibitors --json'),
    'monitor': Command('monitor:monitor', 'Show jobs and images as they come and go', 'ckptctl monitor --json',
                       description='Print every signal of the daemon until Ctrl-C; with --json one object per line.'),
    'doctor': Command('doctor:doctor', 'Check that this machine has what ckptd needs',
                      'ckptctl doctor\nsudo ckptctl doctor --json',
                      description='List every kernel feature and right that ckptd uses, whether it is present, what is '
                                  'lost without it and how to get it. Needs no daemon.'),
    'demo': Command('demo:demo', 'Checkpoint and restore a small tree, end to end', 'ckptctl demo', _demo,
                    'Start a tree of counting processes and a private daemon, checkpoint the tree, look at the '
                    'image in several ways, kill the tree, restore it, see it count on, and clean up. Needs no '
                    'service and no configuration.'),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line and fill in all defaults. InvalidArgument, or SystemExit after --help and --version."""
    parser = build_parser()
    values, rest = parser.parse_known_args(argv)
    if rest:
        raise InvalidArgument(f'unrecognized arguments: {" ".join(rest)}',
                              hint=f'run "ckptctl {values.command} --help"')
    for key, default in COMMON_DEFAULTS.items():
        if not hasattr(values, key):
            setattr(values, key, default)
    if values.spool is not None and not values.standalone:
        raise InvalidArgument('--spool is for --standalone; a running daemon has a spool of its own',
                              hint='add --standalone, or leave out --spool')
    if values.standalone and (values.address or values.bus != 'system'):
        raise InvalidArgument('--standalone uses a bus of its own',
                              hint='leave out --address, --user and --system')
    return values


def build_parser() -> Parser:
    """Build the whole parser."""
    parser = Parser(prog='ckptctl', usage='ckptctl [OPTION...] COMMAND ...', allow_abbrev=False,
                    formatter_class=Formatter, description='Checkpoint trees of running processes through ckptd.',
                    epilog=_epilog('ckptctl doctor\nckptctl demo\nckptctl checkpoint 1234 --standalone'))
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True, title='commands', prog='ckptctl')
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.summary, allow_abbrev=False, formatter_class=Formatter,
                                  description=command.description or command.summary + '.',
                                  epilog=_epilog(command.example))
        command.arguments(sub)
        sub.usage = ' '.join(['ckptctl', name, '[OPTION...]', *_positionals(sub)])
        _add_common(sub)
    parser.add_argument('--version', action='version', version=f'ckptctl {__version__}')
    _add_common(parser)
    return parser


def _positionals(parser: argparse.ArgumentParser) -> list[str]:
    return [f'{action.metavar}{"..." if action.nargs == "+" else ""}'
            for action in parser._actions if not action.option_strings]


class Formatter(argparse.RawDescriptionHelpFormatter):
    """A help formatter that keeps the lines of the examples, wraps the description, and leaves room for long
    options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith('example'):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def _epilog(example: str) -> str:
    lines = example.splitlines()
    return f'example{"s" if len(lines) > 1 else ""}:\n' + '\n'.join(f'  {line}' for line in lines)


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command. SUPPRESS: the default of a sub-parser would overwrite a value given before the
    command."""
    group = parser.add_argument_group('common options')
    bus = group.add_mutually_exclusive_group()
    for add, flag, help_text, how in (
            (group, '--json', 'print JSON instead of text', {'action': 'store_true'}),
            (group, '--no-legend', 'print no heading and no total', {'action': 'store_false', 'dest': 'legend'}),
            (group, '--all', 'list each refusal and warning by itself', {'action': 'store_true'}),
            (bus, '--system', 'use the system bus (default)',
             {'action': 'store_const', 'dest': 'bus', 'const': 'system'}),
            (bus, '--user', 'use your own daemon, on the session bus',
             {'action': 'store_const', 'dest': 'bus', 'const': 'session'}),
            (bus, '--address', 'use the bus at this D-Bus address', {'metavar': 'ADDR'}),
            (group, '--standalone', 'use a bus and a daemon for this command only', {'action': 'store_true'}),
            (group, '--spool', 'directory of the images, with --standalone', {'metavar': 'DIR'})):
        add.add_argument(flag, help=help_text, default=argparse.SUPPRESS, **how)  # type: ignore[arg-type]
