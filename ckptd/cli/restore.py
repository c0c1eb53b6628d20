# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl restore."""

import os
from collections.abc import Iterable
from typing import Any

from ckptd.cli.attend import Attendance
from ckptd.cli.checkpoint import report_findings
from ckptd.cli.follow import JobCall, run_job
from ckptd.cli.options import restore_options, with_token
from ckptd.cli.output import Output
from ckptd.cli.progress import ProgressBar
from ckptd.cli.quantities import format_count, format_timespan
from ckptd.cli.session import LONG, Session
from ckptd.errors import Refused, finding_from

LOST = 'a tree that did not run yet is gone, and one that runs goes on'


async def restore(session: Session) -> int:
    """Restore a tree. With --wait the exit status is that of its root, as a shell reports it."""
    args, out = session.args, session.out
    if args.dry_run:
        return await _dry_run(session)
    bar = ProgressBar(out, args.image)
    async with session.daemon() as daemon:
        def begun(root: int) -> None:
            bar.close()
            _close(args.inherit)
            text = f'the tree runs; its root is process {root}'
            out.passing_note(text) if attendance.has_terminal else out.note(text, 'dim')

        with bar, Attendance(session.interrupts, begun) as attendance:
            options = with_token(restore_options(args))
            if args.wait and not args.terminal:
                options |= attendance.prepare()
            job_call = JobCall('Restore', args.image, options, LOST)
            result = await run_job(daemon, job_call, bar, attendance.begin if args.wait else lambda root: None)
    return _report_end(out, result) if args.wait else _report(out, result, args.leave_stopped)


def _close(inherited: Iterable[tuple[str, int]]) -> None:
    """Close the sockets that the tree has got, whose peers read end-of-file when nobody has them any more. Standard
    streams stay open."""
    for fd in {fd for _, fd in inherited if fd > 2}:
        os.close(fd)


async def _dry_run(session: Session) -> int:
    """List what would prevent the restore. The exit status is that of the error with which a restore would end."""
    image = session.args.image
    async with session.daemon() as daemon:
        with Attendance(session.interrupts, lambda root: None) as attendance:
            # with the terminal that the tree would get
            options = restore_options(session.args)
            if session.args.wait and not session.args.terminal:
                options |= attendance.prepare()
            rows = await daemon.manager('CheckRestore', 'sa{sv}', image, options, seconds=LONG)
    return report_findings(session.out, rows, {'image': image}, f'{image} can{{}} be restored',
                           Refused.restart)


def _report(out: Output, result: dict[str, Any], stopped: bool) -> int:
    if out.json:
        out.document(result)
        return 0
    out.line(str(result['root']))
    fate = f'It is stopped: "kill -CONT {result["root"]}" continues its root.' if stopped else 'The tree runs.'
    out.note(f'{summary(result)}. {fate}', 'dim')
    if result.get('inside'):
        out.note(f'The pid of the root is {result["inside"]} in its pid namespace and {result["root"]} outside.', 'dim')
    out.refusals([finding_from(row) for row in result.get('warnings', ())], on_stderr=True)
    return 0


def summary(result: dict[str, Any]) -> str:
    """Describe a finished restore in one line."""
    processes = format_count(int(result.get('processes', 0)), 'process')
    return (f'{processes} with {format_count(int(result.get("tasks", 0)), "task")} restored in '
            f'{format_timespan(int(result.get("restored_usec", 0)))}')


def _report_end(out: Output, result: dict[str, Any]) -> int:
    """Report the end of a tree. A tree that was released (ckptctl cancel) has no end to report."""
    out.refusals([finding_from(row) for row in result.get('warnings', ())], on_stderr=True)
    if 'exit_status' not in result:
        out.document(result) if out.json else out.note(f'The tree runs on by itself; its root is {result["root"]}.')
        return 0
    status = shell_status(int(result['exit_status']))
    if out.json:
        out.document({**result, 'exit_status': status})
    return status


def shell_status(status: int) -> int:
    """Convert a status of wait(2) as $? shows it: 128 + N after signal N."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
