# SPDX-License-Identifier: LGPL-2.1-or-later
"""Types of arguments for argparse, which shows only the text of an ArgumentTypeError. What --help does not need is
imported late."""

import argparse
import os

from ckptd.cli.quantities import parse_size, parse_timespan
from ckptd.errors import InvalidArgument


def target(text: str) -> str:
    """Return the text of a target for the daemon, which parses it. A bare number is a pid."""
    if not (text.isascii() and text.isdigit()):
        return text
    from ckptd.target import ProcessTarget
    return str(ProcessTarget(int(text)))


def cgroup(text: str) -> str:
    """Return the path of a cgroup, which may be given as in a target."""
    from ckptd.target import CGROUP
    return text.removeprefix(CGROUP)


def inherited(text: str) -> tuple[str, int]:
    """Return a peer and an open file descriptor of this process."""
    from ckptd.external import parse_inherited
    try:
        what, fd = parse_inherited(text)
        os.get_inheritable(fd)
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(f'{error.message}: {error.hint}') from error
    except OSError as error:
        raise argparse.ArgumentTypeError(f'file descriptor {fd} is not open') from error
    return what, fd


def sysv(text: str) -> list[str]:
    """Return the names of System V objects, which are separated by commas."""
    from ckptd.sysv import parse_name
    try:
        return [str(parse_name(name)) for name in text.split(',')]
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(f'{error.message}: {error.hint}') from error


def timespan(text: str) -> int:
    """Call parse_timespan."""
    try:
        return parse_timespan(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def size(text: str) -> int:
    """Call parse_size."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
