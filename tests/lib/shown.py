# SPDX-License-Identifier: LGPL-2.1-or-later
"""What shows that an object is treated as its row of ckptd-objects(7) says: a victim by its name, or a test.

By class of ckptd.objects; `SUPPORT of X` is the row of a module. A new object needs an entry, and an entry an object.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckptd.image.reader import ImageReader
from ckptd.image.records import SavedFile, SharedMemory, TaskAttribute
from ckptd.objects.attributes.registry import ATTRIBUTES
from ckptd.objects.files.registry import BY_TAG
from ckptd.objects.files.unsupported import Unsupported
from ckptd.objects.ipc.base import SystemVKind
from ckptd.objects.mappings.registry import REGIONS, MappingKinds
from ckptd.objects.mappings.shared_memory import SharedMemoryKind
from ckptd.objects.namespaces.base import NamespaceKind

_CHECKS, _NAMESPACES = 'tests/live/test_checks.py', 'tests/worker/test_namespaces.py'
_COVERAGE = 'tests/worker/test_coverage.py::test_every_field_is_read'
_ATTRIBUTES = 'tests/worker/test_refused_attributes.py'

SHOWN: dict[str, tuple[str, ...]] = {
    # files
    'CharacterDeviceKind': ('files',),
    'DeadProcessKind': ('tests/worker/test_dead_processes.py::test_they_come_back',),
    'DirectoryKind': ('files', 'removed'),
    'EpollKind': ('epolls', 'events'),
    'EventfdKind': ('events',),
    'FifoKind': ('pipes', 'removed'),
    'FanotifyKind': ('fanotify', 'tests/worker/test_fanotify.py::test_permission_events_are_refused'),
    'InotifyKind': ('inotify',),
    'IoUringKind': ('io_urings', 'tests/worker/test_io_uring.py::test_what_is_refused'),
    'MemfdKind': ('memfds', 'shared'),
    'MessageQueueKind': ('mqueues', 'tests/worker/test_mqueues.py::test_an_unlinked_queue_with_messages'),
    'NamespaceFileKind': ('namespace_files',),
    'PathKind': ('opath',),
    'PidfdKind': ('pidfds',),
    'InheritedKind': ('tests/worker/test_inherited.py::test_a_socket_of_the_caller',),
    'PipeKind': ('pipes', 'tests/live/kinds/test_registry.py::test_the_pipe_of_an_automounter',),
    'RegularKind': ('files', 'locks', 'leases', 'linked'),
    'SharedMemoryFileKind': ('shared',),
    'SignalfdKind': ('events',),
    'TimerfdKind': ('events',),
    'NetlinkKind': ('netlink',),
    'PacketKind': ('packet_sockets', 'tests/worker/test_packet_sockets.py::test_a_user_is_refused'),
    'RawKind': ('tests/worker/test_inet_sockets.py::test_raw_sockets_come_back',),
    'TcpConnectionKind': ('tcp_connections', 'tcp_closing',
                          'tests/worker/test_tcp_keep.py::test_a_client_sees_a_pause'),
    'TcpKind': ('inet_sockets',),
    'TtyKind': ('terminals',),
    'UdpKind': ('inet_sockets',),
    'UnixKind': ('unix_sockets', 'unix_names', 'socket_filters'),
    'Unsupported': ('tests/live/kinds/test_registry.py::test_what_no_kind_matches_is_refused_by_its_name',),
    # tasks
    'AddressTags': (f'{_ATTRIBUTES}::test_tagged_addresses',),
    'AioContexts': ('aio_rings', 'tests/worker/test_aio.py::test_requests_that_run'),
    'AlternateStack': ('signals',),
    'AutogroupAttribute': ('settings',),
    'ChildSubreaper': ('attributes', 'tree'),
    'ClearedWord': ('threads',),
    'ControllingTerminal': ('terminals',),
    'ForegroundGroup': ('terminals',),
    'CloseOnExec': ('terminals',),
    'CoreScheduling': (f'{_ATTRIBUTES}::test_a_cookie_of_core_scheduling',),
    'CoredumpFilterAttribute': ('attributes',),
    'CredentialsAttribute': ('creds',),
    'DeathSignal': ('attributes',),
    'Directories': ('files', 'removed'),
    'FutexHashAttribute': ('settings',),
    'IntervalTimersAttribute': ('timers',),
    'IoFlusher': ('attributes',),
    'IoPorts': (f'{_ATTRIBUTES}::test_ports',),
    'KeyringsAttribute': ('settings',),
    'Ldt': (f'{_ATTRIBUTES}::test_a_local_descriptor_table',),
    'LoginUidAttribute': ('attributes',),
    'MceKill': ('attributes',),
    'Mdwe': ('attributes',),
    'Membarrier': ('attributes',),
    'MemoryMerge': ('attributes',),
    'MappingPoliciesAttribute': ('settings',),
    'MemoryPolicyAttribute': ('settings',),
    'Name': ('threads',),
    'OomScoreAdj': ('attributes',),
    'Personality': ('attributes',),
    'PosixTimersAttribute': ('timers',),
    'ProcessQueue': ('signals',),
    'ProcessTraps': ('signals',),
    'RegistersAttribute': ('registers',),
    'ResourceLimits': ('attributes',),
    'RobustList': ('threads',),
    'RoomForTiles': ('tiles',),
    'RegisteredRings': ('tests/worker/test_io_uring.py::test_a_ring_that_a_thread_has_registered',),
    'Rseq': ('threads',),
    'SchedulingPolicy': ('attributes',),
    'Seccomp': ('seccomp',),
    'SignalActionsAttribute': ('signals',),
    'SignalMask': ('signals',),
    'Speculation': ('attributes',),
    'ThpDisable': ('attributes', 'settings'),
    'ThreadQueue': ('signals',),
    'ThreadTraps': ('signals',),
    'TilePermission': ('tiles',),
    'TimerSlack': ('attributes',),
    'TrapAction': ('signals',),
    'Tsc': ('attributes',),
    # memory
    'HugePagesMapping': ('tests/worker/test_hugetlb.py::test_it_comes_back',),
    'AioRingMapping': ('aio_rings',),
    'AnonymousMapping': ('memory',),
    'DroppableMapping': ('droppable',),
    'FileMapping': ('memory', 'linked_map'),
    'Guards': ('memory',),
    'HeapMapping': ('memory',),
    'IoUringMapping': ('io_urings',),
    'MemfdMapping': ('memfds', 'shared'),
    'SUPPORT of seals': ('memory',),
    'SUPPORT of special': (f'{_CHECKS}::test_flags_of_special_memory', f'{_CHECKS}::test_names_of_special_memory'),
    'SharedAnonymousMapping': ('shared',),
    'StackMapping': ('memory',),
    'SystemVMapping': ('shared',),
    'VdsoMapping': ('memory',),
    'VsyscallMapping': ('memory',),
    'VvarMapping': ('memory',),
    # System V objects
    'QueuesKind': ('tests/worker/test_system_v.py::test_named_objects_are_made_again',),
    'SemaphoresKind': ('tests/worker/test_system_v.py::test_named_objects_are_made_again',),
    # namespaces
    'CgroupNamespace': ('tests/worker/test_restore_checks.py::test_namespaces_that_are_not_made_again',),
    'OtherNamespace': ('tests/worker/test_restore_checks.py::test_namespaces_that_are_not_made_again',),
    'PidNamespace': (f'{_NAMESPACES}::test_new_pid_namespace',),
    'TimeNamespace': (f'{_NAMESPACES}::test_clocks_go_on_after_a_reboot',),
    'UserNamespace': ('tests/worker/test_restore_checks.py::test_namespaces_that_are_not_made_again',),
    'UtsNamespace': ('tests/worker/test_restore_checks.py::test_namespaces_that_are_not_made_again',),
}


def objects() -> list[type]:
    """Every class that needs a row."""
    return [*BY_TAG.values(), Unsupported, *map(type, ATTRIBUTES), *map(type, MappingKinds().all), *map(type, REGIONS),
            *SystemVKind.__subclasses__(), *NamespaceKind.__subclasses__()]


def missing(victim: str, reader: ImageReader) -> set[str]:
    """The objects that a victim shows and that the image of that victim lacks."""
    return {name for name, shown in SHOWN.items() if victim in shown} & _found_in_images() - set(_in_image(reader))


def _found_in_images() -> set[str]:
    """The classes whose objects a record of the image names."""
    unknown = () if has_speculation_controls() else ('speculation',)
    own = {type(one) for one in ATTRIBUTES if one.name in _OPTIONAL and one.name not in unknown}
    return {cls.__name__ for cls in (*BY_TAG.values(), *own, *(type(one) for one in MappingKinds().all if one.numbers))}


def has_speculation_controls() -> bool:
    """Whether a thread can set any: the kernel says "thread vulnerable" or the like. Not each processor has them."""
    return bool(re.search('^Speculation.*thread ', Path('/proc/self/status').read_text(), re.MULTILINE))


_OPTIONAL = ('PR_SET_CHILD_SUBREAPER', 'PR_SET_THP_DISABLE', 'PR_SET_MDWE', 'PR_MCE_KILL', 'memory policy',
             'mapping policies', 'keyrings', 'coredump_filter', 'loginuid', 'membarrier', 'speculation', 'autogroup')


def _in_image(reader: ImageReader) -> Iterator[str]:
    by_name: dict[str, Any] = {one.name: one for one in ATTRIBUTES}
    yield from (BY_TAG[one.kind].__name__ for one in reader.every(SavedFile))
    yield from (type(by_name[one.name]).__name__ for one in reader.every(TaskAttribute))
    kinds, objects_of = MappingKinds().all, {one.shm_id: one.kind for one in reader.every(SharedMemory)}
    for mm_id in {task.record.mm_id for task in reader.tasks} - {0}:
        for vma in reader.memory(mm_id).vmas:
            yield from (type(one).__name__ for one in kinds if vma.kind in one.numbers
                        and (not isinstance(one, SharedMemoryKind) or one.object_kind == objects_of.get(vma.object)))
