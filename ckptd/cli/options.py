# SPDX-License-Identifier: LGPL-2.1-or-later
"""Options (a{sv}) of Checkpoint, Freeze and Restore, made from the command line."""

import argparse
from typing import Any

from ckptd.bus.message import UnixFd
from ckptd.client.daemon import new_token


def request_options(args: argparse.Namespace) -> dict[str, Any]:
    """Build the options of Checkpoint or Freeze. Options that were not given are left to the daemon's configuration."""
    options: dict[str, Any] = {'freeze': args.freeze}
    if args.timeout is not None:
        options['timeout'] = args.timeout
    if args.command == 'checkpoint':
        options['after'] = args.after
        options['handle_token'] = new_token('ckptctl')
        options |= {name: True for name in ('force', 'save_files') if getattr(args, name)}
        if args.save_limit is not None:
            options['save_limit'] = args.save_limit
        options |= dump_options(args)
    return options


def dump_options(args: argparse.Namespace) -> dict[str, Any]:
    """Build the options of Checkpoint that Check has, too."""
    return {name: value for name in ('external', 'sysv', 'as_root') if (value := getattr(args, name))}


def restore_options(args: argparse.Namespace) -> dict[str, Any]:
    """Build the options of CheckRestore. Restore adds a handle_token, and perhaps a terminal."""
    flags = {name: True for name in ('wait', 'new_pidns', 'clamp', 'force', 'leave_stopped') if getattr(args, name)}
    texts = {name: getattr(args, name) for name in ('cgroup', 'changed_files', 'terminal')
             if getattr(args, name) is not None}
    inherited = [(what, UnixFd(fd)) for what, fd in args.inherit]
    return {**flags, **texts, **({'inherit': inherited} if inherited else {})}


def with_token(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, 'handle_token': new_token('ckptctl')}
