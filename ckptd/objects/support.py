# SPDX-License-Identifier: LGPL-2.1-or-later
"""The row of each object in ckptd-objects(7): what a checkpoint saves of it, and what a restart brings back."""

from typing import Literal, NamedTuple

Dumped = Literal['yes', 'name', 'no']
Restored = Literal['yes', 'partly', 'no']


class Support(NamedTuple):
    """The treatment of an object. The texts are phrases for users, without a full stop. Classes may share a row."""
    what: str                       # the object
    dumped: Dumped = 'yes'          # name: only how to find it again
    restored: Restored = 'yes'      # partly: with the losses of `warned`
    refused: str = ''               # what makes a checkpoint or a restart fail
    warned: str = ''                # what is lost, with a warning
    user: str = ''                  # the difference if an ordinary user restores it
