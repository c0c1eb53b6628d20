# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl checkpoint and ckptctl check."""

import argparse
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ckptd.cli.follow import JobCall, run_job
from ckptd.cli.freeze import hold
from ckptd.cli.options import dump_options, request_options
from ckptd.cli.output import Output, finding_dict
from ckptd.cli.progress import ProgressBar
from ckptd.cli.quantities import format_bytes, format_count, format_timespan
from ckptd.cli.session import LONG, Session
from ckptd.errors import CkptError, Finding, InvalidArgument, Refused, finding_from

PAGE = os.sysconf('SC_PAGE_SIZE')


async def checkpoint(session: Session) -> int:
    """Write an image of a tree. With --detach, return once the job is started."""
    args, out = session.args, session.out
    if args.detach and args.standalone:
        raise InvalidArgument('a job cannot outlive the private daemon of --standalone', hint='leave out --detach')
    if args.force and args.after != 'kill':
        raise InvalidArgument('--force is for --kill', hint='leave out --force')
    if args.save_limit is not None and not args.save_files:
        raise InvalidArgument('--save-limit is for --save-files', hint='add --save-files')
    # made before the tree is frozen, because importing rich takes longer than a small dump
    bar = ProgressBar(out, args.target)
    async with session.daemon() as daemon:
        if args.detach:
            path = await daemon.manager('Checkpoint', 'sa{sv}', args.target, {**request_options(args), 'detach': True})
            return _report_job(out, path, await daemon.manager('ListJobs'))
        with bar:
            result = await run_job(daemon, JobCall('Checkpoint', args.target, request_options(args)), bar)
        _report(out, result, args)
        if args.standalone and args.after == 'freeze':
            await hold(session, daemon, args.target)
    return 0


async def check(session: Session) -> int:
    """List refusals and warnings. The exit status is that of the error with which a checkpoint would end."""
    target = session.args.target
    async with session.daemon() as daemon:
        rows = await daemon.manager('Check', 'sa{sv}', target, dump_options(session.args), seconds=LONG)
    return report_findings(session.out, rows, {'target': target}, f'{target} can{{}} be checkpointed')


def report_findings(out: Output, rows: Sequence[dict[str, Any]], about: dict[str, str], sentence: str,
                    error: Callable[[Iterable[Finding]], CkptError] = Refused.because) -> int:
    """Print rows of Check or CheckRestore and return the exit status. about: fields for the JSON document. sentence:
    '... can{} be ...'. error: makes the error with which the operation itself would end."""
    findings = [finding_from(row) for row in rows]
    refusals = [finding for finding in findings if finding.severity == 'refusal']
    if out.json:
        out.document({**about, 'possible': not refusals,
                      'refusals': [finding_dict(finding) for finding in refusals],
                      'warnings': [finding_dict(finding) for finding in findings if finding.severity != 'refusal']})
    else:
        _report_check(out, sentence, findings, refusals)
    return error(refusals).exit_status if refusals else 0


def summary(result: dict[str, Any]) -> str:
    """Describe a finished checkpoint in one line."""
    pages = int(result.get('pages_written', 0))
    times = [format_timespan(int(result.get(name, 0))) for name in ('frozen_time', 'total_time')]
    return (f'{format_count(int(result.get("tasks", 0)), "task")}, {format_count(pages, "page")} '
            f'({format_bytes(pages * PAGE)}) written, frozen for {times[0]}, {times[1]} in all')


def restore_command(args: argparse.Namespace, image: str, *options: str) -> str:
    """Return the command that restores an image which this command line has made."""
    where = ['--standalone', *(['--spool', args.spool] if args.spool else [])] if args.standalone else (
        ['--address', args.address] if args.address else ['--user'] if args.bus == 'session' else [])
    return shlex.join(['ckptctl', 'restore', image, *options, *map(str, where)])


def _report(out: Output, result: dict[str, Any], args: argparse.Namespace) -> None:
    if out.json:
        out.document({**result, 'target': args.target})
        return
    out.line(str(result['image']))
    if args.quiet:
        return
    fate = {'resume': 'The tree is as it was.', 'kill': 'The tree was killed.',
            'freeze': f'The tree stays frozen until "ckptctl thaw {args.target}".'}[args.after]
    if args.standalone and args.after == 'freeze':
        fate = 'The tree stays frozen.'
    out.note(f'{summary(result)}. {fate}', 'dim')
    warnings = [finding_from(row) for row in result.get('warnings', ())]
    if args.after == 'kill':
        # a tree on a terminal of the outside comes back on another one
        options = ['--wait'] if any(one.errno == 'ENOTTY' for one in warnings) else []
        out.note(f'To bring it back: {restore_command(args, str(result["image"]), *options)}')
    out.refusals(warnings, on_stderr=True)


def _report_job(out: Output, path: str, jobs: Sequence[Sequence[Any]]) -> int:
    """Print the job. jobs: the result of ListJobs, which has the number, while the path contains the token of this
    call."""
    number = next((row[0] for row in jobs if row[1] == path), 0)
    if out.json:
        out.document({'job': number, 'path': path})
    else:
        out.line(str(number))
        out.note(f'started job {number}: "ckptctl jobs" shows it, "ckptctl cancel {number}" cancels it', 'dim')
    return 0


def _report_check(out: Output, sentence: str, findings: list[Finding], refusals: list[Finding]) -> None:
    out.refusals(findings)
    if refusals:
        out.line(f'{sentence.format("not")}: {format_count(len(refusals), "refusal")}.', 'bold red')
    else:
        warned = f', with {format_count(len(findings), "warning")}' if findings else ''
        out.line(f'{sentence.format("")}{warned}.', 'bold green')
