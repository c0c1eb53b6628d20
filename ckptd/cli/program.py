# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run another program with a time limit."""

import asyncio
from collections.abc import Mapping
from typing import NamedTuple


class Done(NamedTuple):
    """The result of a program."""
    status: int       # as in subprocess, negative for a signal
    out: str          # its standard output
    complaint: str    # its standard error


async def run_program(*command: str, seconds: float, env: Mapping[str, str] | None = None) -> Done:
    """Run a program without input. TimeoutError after `seconds`. The program has ended in any case."""
    process = await asyncio.create_subprocess_exec(
        *command, env=env, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(seconds):
            out, complaint = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
        status = await process.wait()
    return Done(status, out.decode(errors='replace'), complaint.decode(errors='replace'))
