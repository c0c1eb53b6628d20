# SPDX-License-Identifier: LGPL-2.1-or-later
"""The steps of the journal. Each class is the record of a change to the system and the code that takes, undoes and
describes it."""

from ckptd.journal.steps.base import Count, Lifetime, Moved, Pid, Step, StepContext
from ckptd.journal.steps.cgroups import Born, FreezeCgroup, MakeCgroup, MakeHome, Move
from ckptd.journal.steps.files import KeepFile, LinkFile, MakeFile
from ckptd.journal.steps.packets import DropPackets
from ckptd.journal.steps.processes import EndProcesses, EndUsersProcesses, Known
from ckptd.journal.steps.repair import RepairSockets
from ckptd.journal.steps.segments import MakeSegment
from ckptd.journal.steps.sockets import BindSocket
from ckptd.journal.steps.system_v import MakeSystemV
from ckptd.journal.steps.terminals import TakeFromTerminal
from ckptd.journal.steps.units import FreezeUnit, ThawUnit
from ckptd.journal.steps.walks import HeldSocket, PeekOffset, WalkQueues

__all__ = ['AnyStep', 'BindSocket', 'Born', 'Count', 'DropPackets', 'EndProcesses', 'EndUsersProcesses',
           'FreezeCgroup', 'FreezeUnit', 'HeldSocket', 'KeepFile', 'Known', 'Lifetime', 'LinkFile', 'MakeCgroup',
           'MakeFile', 'MakeHome', 'MakeSegment', 'MakeSystemV', 'Move', 'Moved', 'PeekOffset', 'Pid',
           'RepairSockets', 'RestartStep', 'Step', 'StepContext', 'TakeFromTerminal', 'TakeStep', 'ThawUnit',
           'WalkQueues']

AnyStep = (MakeCgroup | FreezeCgroup | Move | FreezeUnit | ThawUnit | MakeHome | Born | MakeSegment | MakeFile
           | KeepFile | LinkFile | EndProcesses | EndUsersProcesses | WalkQueues | BindSocket
           | TakeFromTerminal | RepairSockets | DropPackets | MakeSystemV)
# steps by which a checkpoint takes out of the kernel what it kills the tree for
TakeStep = TakeFromTerminal | RepairSockets | DropPackets
# steps by which a restart makes and changes objects outside of its tree, with the rights of the user
RestartStep = MakeSegment | MakeSystemV | MakeFile | KeepFile | BindSocket
