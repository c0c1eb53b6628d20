# SPDX-License-Identifier: LGPL-2.1-or-later
"""The freeze journal. Each change to the system that a freeze makes is written down before it is made.

    RUNTIME/freezes/         0700; flock(2) held while entries are made, listed or claimed
        17-9f3ac2d1.jsonl    one freeze; flock(2) held while its owner lives; only ever appended to, each line fsynced
            {"type":"Begin","version":1,"boot":"f2c1...","job":17,"target":"pid:4242","mode":"cgroup"}
            {"type":"MakeCgroup","cgroup":"/a/ckptd-17-9f3ac2d1"}
            {"type":"FreezeCgroup","cgroup":"/a/ckptd-17-9f3ac2d1"}
            {"type":"Move","to":"/a/ckptd-17-9f3ac2d1","processes":[[4242,99887,"/a"]]}
            {"type":"Undone","step":1}

A line without an end was being written when its owner died, so its step was never taken. A log that is only appended to
needs no other care. `steps/` has a class for each type of line but Begin, Undone and Redone. Steps are undone newest
first, and undoing a step twice is harmless. The lock ends with the last process that has the file open, so an entry
whose lock is free has no owner (`Journal.claim`).
"""

from ckptd.journal.recover import recover
from ckptd.journal.store import Journal

__all__ = ['Journal', 'recover']
