# SPDX-License-Identifier: LGPL-2.1-or-later
"""The a{sv} of options that Checkpoint and Freeze take, from the command line."""

import argparse
import os
import secrets
from typing import Any


def request_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was not asked for is left to the daemon, whose configuration may say otherwise."""
    options: dict[str, Any] = {'freeze': args.freeze}
    if args.timeout is not None:
        options['timeout'] = args.timeout
    if args.command == 'checkpoint':
        options['after'] = args.after
        options['handle_token'] = f'ckptctl_{os.getpid()}_{secrets.token_hex(4)}'
    return options
