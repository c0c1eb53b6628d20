# SPDX-License-Identifier: LGPL-2.1-or-later
"""An executor: a stopped task that runs code of ours up to a trap, where it stops for its tracer again.

Two kinds of tasks are executors:

    borrow.py   a task that is saved. The code lies in unused bytes of its text; registers, signal mask and rseq are
                restored after each run
    stub.py     a task that is made. The code lies in the arena; the task has no state of its own yet
"""

import os
from abc import ABC, abstractmethod

from ckptd.kernel.arch.x86_64 import user_regs_struct
from ckptd.kernel.ptrace import Tracee
from ckptd.remote.batch import Batch, Results
from ckptd.remote.interleave import Steps


class Executor(ABC):
    """A stopped task that runs code up to a trap.

    table: address of the memory for batches. room: its length. trap_signal: the signal that the trap causes.
    must_return: a run whose generator is closed is waited for all the same, because the task gets its own state back.
    """
    trap_signal: int
    must_return = False

    def __init__(self, tracee: Tracee, table: int, room: int) -> None:
        self.tracee = tracee
        self._table, self._room = table, room
        self._trapped: user_regs_struct | None = None       # the registers at the last trap

    def execute(self, batch: Batch) -> Steps[Results]:
        """Execute all calls of a batch. Return the results, whether calls failed or not."""
        memory = batch.encode(self._table)
        if len(memory) > self._room:
            raise ValueError(f'batch of {len(memory)} bytes is too large')
        self._write(self._table, memory)
        yield from self.go(self._table)
        return batch.decode(self._read(self._table, len(memory)))

    @abstractmethod
    def go(self, table: int) -> Steps[None]:
        """Execute the calls of the table at this address."""

    def wait(self) -> int:
        """Return the status of the next stop, as Tracee.wait does."""
        return self.tracee.wait()

    # ------------------------------------------------------------ for the two kinds

    def _run(self, regs: user_regs_struct, trap: int) -> Steps[None]:
        """Run from these registers until rip is `trap` at a stop by the trap signal."""
        self._set_state(regs)
        self.tracee.cont()
        try:
            yield
        except GeneratorExit:
            if self.must_return:
                self._wait_trap(trap)
            raise
        self._wait_trap(trap)

    def _wait_trap(self, trap: int) -> None:
        while not self._is_trap(status := self.wait(), trap):
            self.tracee.cont(self._pass(status))

    def _is_trap(self, status: int, trap: int) -> bool:
        if status >> 16 or os.WSTOPSIG(status) != self.trap_signal:
            return False
        regs = self.tracee.regs
        if regs.rip == trap:
            self._trapped = regs
        return regs.rip == trap

    def _set_state(self, regs: user_regs_struct) -> None:
        """Set the state with which the task runs."""
        self.tracee.regs = regs

    @abstractmethod
    def _pass(self, status: int) -> int:
        """Handle a stop that is not the trap. Return the signal with which the task continues. CkptError."""

    @abstractmethod
    def _write(self, at: int, data: bytes) -> None:
        """Write to the memory of the task."""

    @abstractmethod
    def _read(self, at: int, length: int) -> bytes:
        """Read memory of the task."""
