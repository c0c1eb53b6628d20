# SPDX-License-Identifier: LGPL-2.1-or-later
"""Another program, run to its end within a time."""

import asyncio
from collections.abc import Mapping
from typing import NamedTuple


class Done(NamedTuple):
    """status: as subprocess has it, negative for a signal. What it said, as text."""
    status: int
    out: str
    complaint: str


async def run_program(*command: str, seconds: float, env: Mapping[str, str] | None = None) -> Done:
    """Run it without input. TimeoutError after `seconds`; however this ends, the program has ended too."""
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
