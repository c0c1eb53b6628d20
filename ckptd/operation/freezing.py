# SPDX-License-Identifier: LGPL-2.1-or-later
"""A freeze by the broker. The worker has no right to a cgroup, and the broker journals each step.

If the broker has no cgroup for the tree and any freezer may be used, the worker stops the tree by ptrace.
"""

from ckptd.errors import NotSupported
from ckptd.freezer.base import FreezeRequest, FrozenTree
from ckptd.freezer.traced import TracedFrozen
from ckptd.protocol.broker_calls import EndTree, FreezeTree, HoldTree, LetRun, RestoreTree
from ckptd.protocol.channel import Channel
from ckptd.protocol.requests import FreezeMode
from ckptd.tree import Tree


class LentFreeze(FrozenTree):
    """A tree that the broker has frozen. The tracees are the worker's own."""

    def __init__(self, tree: Tree, freeze_request: FreezeRequest, channel: Channel) -> None:
        super().__init__(tree, freeze_request)
        self._channel = channel
        self._moved = self._is_restored = False

    def freeze_as(self, mode: FreezeMode) -> None:
        """Ask the broker for a freeze. NotSupported if it has no means to freeze the tree."""
        value, _ = self._channel.call(FreezeTree(mode, self._freeze_request.remote_calls))
        self.mode, self._moved = str(value['mode']), bool(value['moved'])
        self.tree = self.rescan()

    @property
    def moved(self) -> bool:
        return self._moved

    def let_run(self) -> None:
        self._channel.call(LetRun())

    def hold(self) -> None:
        self._channel.call(HoldTree())

    def condemn(self, *, again: bool = True) -> None:
        self._channel.call(EndTree(again=again))

    def restore(self) -> None:
        if not self._is_restored:
            self._is_restored = True
            self._channel.call(RestoreTree())


class _LentTraced(TracedFrozen):
    """A tree that the worker has stopped by ptrace. The broker journals its end."""

    def __init__(self, tree: Tree, freeze_request: FreezeRequest, channel: Channel) -> None:
        super().__init__(tree, freeze_request)
        self._channel = channel

    def condemn(self, *, again: bool = True) -> None:
        self._channel.call(EndTree(self.living(), again))


def lent_freeze(tree: Tree, freeze_request: FreezeRequest, mode: FreezeMode, channel: Channel) -> FrozenTree:
    """Freeze a tree and return it, for `with`, like ckptd.freezer.freeze."""
    if mode != 'ptrace':
        lent = LentFreeze(tree, freeze_request, channel)
        try:
            lent.freeze_as(mode)
        except NotSupported:
            if mode != 'auto':
                raise
        except BaseException as error:
            lent.close_after(error)
            raise
        else:
            return lent
    traced = _LentTraced(tree, freeze_request, channel)
    try:
        traced.freeze()
    except BaseException as error:
        traced.close_after(error)
        raise
    return traced
