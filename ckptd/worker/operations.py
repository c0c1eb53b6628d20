# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations of a worker, by name. Each operation sends Finished itself; an exception becomes Failed."""

import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import assert_never

from ckptd.dump.run import checkpoint, hold
from ckptd.errors import ImageDamaged
from ckptd.image.reader import ImageReader
from ckptd.image.references import MAX_DAMAGES
from ckptd.image.verify import verify
from ckptd.inspect.checks import check_access, check_confinement, is_untraceable
from ckptd.inspect.scan import scan_tree
from ckptd.inspect.task_rows import image_rows, live_rows
from ckptd.journal.recover import recover
from ckptd.journal.store import Journal
from ckptd.objects.ipc.registry import damages as system_v_damages
from ckptd.objects.verify import file_damages
from ckptd.operation.context import JobContext
from ckptd.protocol.channel import Channel
from ckptd.protocol.messages import Frozen, finding_row
from ckptd.protocol.requests import (
    CheckpointRequest,
    CheckRequest,
    CheckRestoreRequest,
    ExportRequest,
    HoldRequest,
    ImageTreeRequest,
    ImportRequest,
    RecoverRequest,
    RemoveNamesRequest,
    Request,
    RestartRequest,
    RestoreRequest,
    ScanRequest,
    TraceRequest,
    VerifyRequest,
)
from ckptd.restore.linked_names import forget_files, take_names_away
from ckptd.restore.prepare import check_restore
from ckptd.restore.run import restore
from ckptd.worker.archive import export_image, import_image


def check(job: JobContext[CheckRequest]) -> None:
    """List every refusal and warning. Nothing is frozen and nothing is written."""
    job.channel.phase('resolve')
    target = job.resolve()
    job.channel.phase('scan')
    tree, rows = job.look_for_refusals(target.roots)
    job.channel.finish('refusals', [finding_row(row) for row in rows], {'tasks': len(tree)})


def scan(job: JobContext[ScanRequest]) -> None:
    """List the tree as rows, with memory and open files only of tasks that the caller may inspect."""
    job.channel.phase('scan')
    tree = job.look()
    caller = job.request.caller
    denied = {refusal.pid for refusal in (*check_access(tree, caller), *check_confinement(tree, caller))}
    job.channel.finish('tasks', live_rows(tree, denied))


def check_trace(job: JobContext[TraceRequest]) -> None:
    """Tell whether a security module forbids the caller to trace tasks that it may inspect."""
    job.channel.phase('scan')
    job.channel.finish('', (), {'forbidden': is_untraceable(job.look(), job.request.caller)})


def freeze(job: JobContext[HoldRequest]) -> None:
    """Freeze, and hold until Thaw, Cancel or the daemon's end."""
    job.channel.phase('resolve')
    target = job.resolve()
    job.channel.phase('scan')
    tree = scan_tree(target.roots)
    job.require_access(tree)
    job.channel.phase('freeze')
    with job.frozen(target, tree, remote_calls=False) as frozen:
        hold(frozen)
        job.channel.send(Frozen(len(frozen.tree), frozen.mode))
        job.channel.finish('', (), {'tasks': len(frozen.tree), 'freeze_mode': frozen.mode})
        job.channel.wait_thaw()


def verify_image(job: JobContext[VerifyRequest]) -> None:
    """List every damage of an image."""
    with job.image_files() as files:
        damages = verify(files)
        if not damages:     # if there are some, its records may be unreadable
            with ImageReader(files) as reader:
                damages = list(islice(chain(file_damages(reader), system_v_damages(reader)), MAX_DAMAGES))
        job.channel.finish('damages', damages)


def image_tree(job: JobContext[ImageTreeRequest]) -> None:
    """List the tree of an image as rows."""
    with job.image_files() as files, ImageReader(files) as reader:
        job.channel.finish('tasks', image_rows(reader))


def remove_names(job: JobContext[RemoveNamesRequest]) -> None:
    """Remove what the checkpoint of an image made outside of it, before the image is removed.

    An imported image has nothing on this machine, even if its records name something. A damaged image is ignored: it
    can be removed as well.
    """
    with suppress(ImageDamaged), job.image_files() as files, ImageReader(files) as reader:
        if not reader.manifest.imported:
            take_names_away(reader)
            # an image of another user does not say what root removes
            if reader.manifest.owner_uid == os.geteuid() == 0:
                forget_files(reader)
    job.channel.finish('', (), {})


def recover_files(job: JobContext[RecoverRequest]) -> None:
    """Undo the file steps of dead workers."""
    job.channel.finish('report', recover(Journal(Path(job.request.runtime)), files=True))


def operate(request: Request, channel: Channel, fds: Sequence[int]) -> None:
    """Do the operation of a request. fds: those that came with it (protocol/requests.py)."""
    inherited = tuple(fds[-len(request.inherit):]) if isinstance(request, RestartRequest) and request.inherit else ()
    fd = next(iter(fds[:len(fds) - len(inherited)]), -1)
    match request:
        case CheckpointRequest():
            checkpoint(JobContext(request, channel, fd))
        case CheckRequest():
            check(JobContext(request, channel, fd))
        case ScanRequest():
            scan(JobContext(request, channel, fd))
        case TraceRequest():
            check_trace(JobContext(request, channel, fd))
        case HoldRequest():
            freeze(JobContext(request, channel, fd))
        case VerifyRequest():
            verify_image(JobContext(request, channel, fd))
        case ImageTreeRequest():
            image_tree(JobContext(request, channel, fd))
        case RemoveNamesRequest():
            remove_names(JobContext(request, channel, fd))
        case ExportRequest():
            export_image(JobContext(request, channel, fd))
        case ImportRequest():
            import_image(JobContext(request, channel, fd))
        case RestoreRequest():
            restore(JobContext(request, channel, fd, inherited))
        case CheckRestoreRequest():
            check_restore(JobContext(request, channel, fd, inherited))
        case RecoverRequest():
            recover_files(JobContext(request, channel, fd))
        case _:
            assert_never(request)
