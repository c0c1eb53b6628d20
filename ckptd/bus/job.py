# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.ckptd1.Job at /org/ckptd1/job/N: a job and its progress."""

from typing import Any

from ckptd.bus.authorizer import Authorizer, Verb
from ckptd.bus.call import Call
from ckptd.bus.export import Audience, Exported, method, property_, signal
from ckptd.bus.names import JOB, job_path
from ckptd.bus.options import NONE, parse_options
from ckptd.bus.router import ERROR_TYPES
from ckptd.bus.values import to_variant
from ckptd.bus.wire import Variant
from ckptd.jobs.queue import Queue
from ckptd.jobs.state import JobRecord

RESULT_TYPES = {'tasks': 'u', 'processes': 'u', 'root': 'u', 'inside': 'u', 'exit_status': 'u', 'pid': 'u',
                'warnings': 'aa{sv}'}
VERBS: dict[str, Verb] = {'checkpoint': 'checkpoint', 'freeze': 'freeze', 'restore': 'restore'}
MOVING = ('TasksDone', 'TasksTotal', 'BytesDone', 'BytesTotal', 'Progress', 'ExpectedEndTime')


def path_of(job: JobRecord) -> str:
    return job.token or job_path(job.number)


class JobObject(Exported):
    interface = JOB
    audience: Audience

    def __init__(self, job: JobRecord, queue: Queue, authorizer: Authorizer) -> None:
        self.job, self._queue, self._authorizer = job, queue, authorizer
        self._outcome: dict[str, Variant] = {}      # cached: it may have many rows, and it no longer changes
        # progress signals are frequent and interest few clients
        self.audience = Audience(job.request.asked_by, followers=set())
        self._announced = job.state, job.root        # the last state announced to all who know of the job

    @method('a{sv}', names=('options',))
    async def Cancel(self, call: Call, options: dict[str, Any]) -> None:
        """Cancel the job: release its tree and leave nothing behind. A restored tree that already runs goes on. A
        finished job is not changed."""
        parse_options(options, NONE)
        await self._authorizer.job(call, VERBS.get(self.job.request.operation, 'manage'), self.job)
        self._queue.cancel(self.job.number)

    # a property is already called Progress
    progressed = signal('sdtt', ('phase', 'progress', 'bytes_done', 'bytes_total'), name='Progress',
                        doc='Progress of the job, at most ten times a second. The last change is always sent.')

    def tell_state(self) -> None:
        """Announce the state. A start, a new root and the end go to all who know of the job, as there are few of these.
        Progress goes to its followers."""
        now = self.job.state, self.job.root
        if now != self._announced:
            self._announced = now
            self.changed('State', 'Phase', 'Root', 'Error', 'Result', *MOVING, to=Audience(self.audience.uid))
        else:
            self.changed('Phase', *MOVING)

    def tell_progress(self) -> None:
        """Send the signal Progress and the changed properties."""
        job = self.job
        self.progressed(job.phase, job.progress, job.counts.bytes_done, job.counts.bytes_total)
        self.changed(*MOVING)

    @property_('s')
    def State(self) -> str:
        """State of the job: queued, running, done, failed or cancelled."""
        return self.job.state.value

    @property_('s')
    def Phase(self) -> str:
        """Phase of the job, as in the signal Progress. While the job is queued it is '', or 'prepare' if an inhibitor
        delays it."""
        return self.job.phase

    @property_('s', emits='const')
    def Operation(self) -> str:
        """Operation of the job: checkpoint, restore, freeze, verify, export or import."""
        return self.job.request.operation

    @property_('s', emits='const')
    def Target(self) -> str:
        """Target of the job. For a restore, the target that was dumped."""
        return self.job.request.about

    @property_('s', emits='const')
    def Image(self) -> str:
        """Id of the image that the job reads or makes; '' if there is none."""
        return self.job.request.image_id

    @property_('u')
    def Root(self) -> int:
        """Pid of the root of a restored tree, once the tree runs; 0 before, and for other jobs."""
        return self.job.root

    @property_('u')
    def TasksDone(self) -> int:
        """Number of tasks done in this phase."""
        return self.job.counts.tasks_done

    @property_('u')
    def TasksTotal(self) -> int:
        """Number of tasks in this phase; 0 while unknown."""
        return self.job.counts.tasks_total

    @property_('t')
    def BytesDone(self) -> int:
        """Number of bytes done in this phase."""
        return self.job.counts.bytes_done

    @property_('t')
    def BytesTotal(self) -> int:
        """Number of bytes in this phase; 0 while unknown."""
        return self.job.counts.bytes_total

    @property_('d')
    def Progress(self) -> float:
        """Share of the whole job that is done, from 0 to 1. It never decreases."""
        return self.job.progress

    @property_('t', emits='const')
    def StartTime(self) -> int:
        """Time of the request, in microseconds of the real-time clock."""
        return self.job.start_time

    @property_('t')
    def ExpectedEndTime(self) -> int:
        """Expected time of the end, in microseconds of the real-time clock; 0 while unknown."""
        return self.job.expected_end

    @property_('u', emits='const')
    def StartedByUID(self) -> int:
        """Uid of the user who asked for the job."""
        return self.job.request.asked_by

    @property_('a{sv}')
    def Error(self) -> Variant | dict[str, Any]:
        """Error of a failed or cancelled job: name, message, and the details of an error message. Otherwise empty."""
        error = self.job.error
        if error and 'Error' not in self._outcome:
            row = {'name': error.dbus_name, 'message': error.message, **error.details()}
            self._outcome['Error'] = to_variant(row, 'a{sv}', ERROR_TYPES)
        return self._outcome.get('Error', {})

    @property_('a{sv}')
    def Result(self) -> Variant | dict[str, Any]:
        """Result of a finished job. Otherwise empty."""
        if self.job.over and 'Result' not in self._outcome:
            self._outcome['Result'] = to_variant(self.job.result, 'a{sv}', RESULT_TYPES)
        return self._outcome.get('Result', {})
