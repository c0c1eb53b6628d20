# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.ckptd1.Job at /org/ckptd1/job/N: what a job does, and how far it is."""

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
        self._outcome: dict[str, Variant] = {}      # its rows may be many, and do not change any more
        # its progress is much, and of interest to few
        self.audience = Audience(job.request.asked_by, followers=set())
        self._told = job.state, job.root        # to all who know of it

    @method('a{sv}', names=('options',))
    async def Cancel(self, call: Call, options: dict[str, Any]) -> None:
        """Release the tree and leave nothing; a restored one that runs is let go. A job that is over stays as it is."""
        parse_options(options, NONE)
        await self._authorizer.job(call, VERBS.get(self.job.request.operation, 'manage'), self.job)
        self._queue.cancel(self.job.number)

    # a property has the name already
    progressed = signal('sdtt', ('phase', 'progress', 'bytes_done', 'bytes_total'), name='Progress',
                        doc='How far the job is: at most ten times a second, the last one always.')

    def tell_state(self) -> None:
        """That it begins, has made a tree, or is over, concerns all who know of it, some few times in its life; how far
        it is, those who follow it."""
        now = self.job.state, self.job.root
        if now != self._told:
            self._told = now
            self.changed('State', 'Phase', 'Root', 'Error', 'Result', *MOVING, to=Audience(self.audience.uid))
        else:
            self.changed('Phase', *MOVING)

    def tell_progress(self) -> None:
        """The signal, and the properties with it."""
        job = self.job
        self.progressed(job.phase, job.progress, job.counts.bytes_done, job.counts.bytes_total)
        self.changed(*MOVING)

    @property_('s')
    def State(self) -> str:
        """queued, running, done, failed or cancelled."""
        return self.job.state.value

    @property_('s')
    def Phase(self) -> str:
        """What it is at, as in the signal Progress; while it is queued '', or 'prepare' where somebody delays it."""
        return self.job.phase

    @property_('s', emits='const')
    def Operation(self) -> str:
        """checkpoint, restore, freeze, verify, export or import."""
        return self.job.request.operation

    @property_('s', emits='const')
    def Target(self) -> str:
        """The tree that it works on; of a restore, the one that was dumped."""
        return self.job.request.target

    @property_('s', emits='const')
    def Image(self) -> str:
        """The id that the image has, or will have; '' for a job that is about none."""
        return self.job.request.image

    @property_('u')
    def Root(self) -> int:
        """The pid of a restored tree's root, once it runs; 0 before, and for other jobs."""
        return self.job.root

    @property_('u')
    def TasksDone(self) -> int:
        """How many tasks it is done with in this phase."""
        return self.job.counts.tasks_done

    @property_('u')
    def TasksTotal(self) -> int:
        """Of how many; 0 while that is unknown."""
        return self.job.counts.tasks_total

    @property_('t')
    def BytesDone(self) -> int:
        """How many bytes it is done with in this phase."""
        return self.job.counts.bytes_done

    @property_('t')
    def BytesTotal(self) -> int:
        """Of how many; 0 while that is unknown."""
        return self.job.counts.bytes_total

    @property_('d')
    def Progress(self) -> float:
        """The share of the whole that is done, from 0 to 1; it never goes back."""
        return self.job.progress

    @property_('t', emits='const')
    def StartTime(self) -> int:
        """When it was asked for, in microseconds of the real-time clock."""
        return self.job.start_time

    @property_('t')
    def ExpectedEndTime(self) -> int:
        """When it should be over, in the same microseconds; 0 while that is unknown."""
        return self.job.expected_end

    @property_('u', emits='const')
    def StartedByUID(self) -> int:
        """Who asked for it."""
        return self.job.request.asked_by

    @property_('a{sv}')
    def Error(self) -> Variant | dict[str, Any]:
        """Of a job that failed or was cancelled: name, message, and what an error message has; else empty."""
        error = self.job.error
        if error and 'Error' not in self._outcome:
            row = {'name': error.dbus_name, 'message': error.message, **error.details()}
            self._outcome['Error'] = to_variant(row, 'a{sv}', ERROR_TYPES)
        return self._outcome.get('Error', {})

    @property_('a{sv}')
    def Result(self) -> Variant | dict[str, Any]:
        """What came of a job that is done; else empty."""
        if self.job.over and 'Result' not in self._outcome:
            self._outcome['Result'] = to_variant(self.job.result, 'a{sv}', RESULT_TYPES)
        return self._outcome.get('Result', {})
