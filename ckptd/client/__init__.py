# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client library of ckptd.

With an event loop: `connect`, and the classes that it gives, `Ckptd`, `Job`, `Image`. Without one: the same names in
ckptd.client.sync. A program that checkpoints its own tree needs neither:

    from ckptd.client import checkpoint_self

    for round in work:
        if checkpoint_self() == 'restored':
            log('restored, in round', round)     # another run of the same memory, perhaps days later

The call returns once in the tree that goes on and once in each tree that is restored from the image, like the two
returns of fork(2). It needs no event loop and leaves nothing open. Errors are those of ckptd.errors, with their
refusals.
"""

from ckptd.client.connection import Ckptd, Image, Inhibitor, connect
from ckptd.client.events import (
    Event,
    ImageAdded,
    ImageRemoved,
    JobNew,
    JobRemoved,
    PrepareForCheckpoint,
    Progress,
    Restored,
    Running,
)
from ckptd.client.hub import Events
from ckptd.client.itself import Outcome, checkpoint_self
from ckptd.client.job import Job
from ckptd.client.records import (
    CheckpointResult,
    ImageDetails,
    ImageInfo,
    InhibitorInfo,
    JobInfo,
    JobStatus,
    ManagerInfo,
    RestoreResult,
    TaskInfo,
)

__all__ = ['CheckpointResult', 'Ckptd', 'Event', 'Events', 'Image', 'ImageAdded', 'ImageDetails', 'ImageInfo',
           'ImageRemoved', 'Inhibitor', 'InhibitorInfo', 'Job', 'JobInfo', 'JobNew', 'JobRemoved', 'JobStatus',
           'ManagerInfo', 'Outcome', 'PrepareForCheckpoint', 'Progress', 'RestoreResult', 'Restored', 'Running',
           'TaskInfo', 'checkpoint_self', 'connect']
