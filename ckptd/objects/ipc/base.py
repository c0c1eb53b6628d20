# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hooks of a type of System V objects. They belong to no process and outlive all of them, so the user names those
that belong to an image. The hooks in life order:

    living()                    the ids that there are, with their keys
    read(id)                    the state of one of them, which stays as it is
    flaws(state)                violations in a state that comes from an image
    obstacles(state, context)   reasons why this machine cannot have it again; changes nothing
    make(id, state)             a new one with exactly this id, empty
    fill(id, state)             its content, owner and mode
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar, Generic, Protocol, TypeVar, get_args, get_origin

from ckptd.errors import Finding
from ckptd.image.grammar import U16, U32, Struct, layout
from ckptd.image.reader import ImageReader
from ckptd.objects.files.base import FileLookup

MAX_MODE = 0o777


@layout
class IpcPermissions(Struct):
    """struct ipc_perm of <linux/ipc.h>."""
    key: U32        # 0 for IPC_PRIVATE
    uid: U32        # of the owner
    gid: U32        # likewise
    mode: U16


class IpcCheck(Protocol):
    """The input of the checks of a restart."""

    @property
    def reader(self) -> ImageReader: ...
    @property
    def lookup(self) -> FileLookup: ...

    def may(self, capability: int) -> bool:
        """Whether we have this capability, in the user namespace of the machine."""


S = TypeVar('S', bound=Struct)


class SystemVKind(ABC, Generic[S]):
    """A type: `class SemaphoresKind(SystemVKind[SemaphoreState], tag='sem')`. tag: the type in ckptd.sysv, and in
    the names of sysctls. words: for people. remove: the option of ipcrm(1)."""
    tag: ClassVar[str]
    state: ClassVar[type[Struct]]
    words: ClassVar[str]
    remove: ClassVar[str]

    def __init_subclass__(cls, *, tag: str) -> None:
        cls.tag = tag
        cls.state = next(get_args(base)[0] for base in cls.__orig_bases__  # type: ignore[attr-defined]
                         if get_origin(base) is SystemVKind)

    @abstractmethod
    def living(self) -> Mapping[int, int]: ...

    @abstractmethod
    def read(self, number: int) -> S:
        """Read the state. OSError: EINVAL, EIDRM: there is none; EACCES: it may not be read."""

    def flaws(self, state: S) -> Iterator[str]:
        yield from ()

    def obstacles(self, state: S, context: IpcCheck) -> Iterator[Finding]:
        yield from ()

    @abstractmethod
    def make(self, number: int, state: S) -> None: ...

    @abstractmethod
    def fill(self, number: int, state: S) -> None: ...
