# SPDX-License-Identifier: LGPL-2.1-or-later
"""A timerfd: a timer that is read (timerfd_create(2))."""

import os
import time

from ckptd.errors import CkptError, Finding
from ckptd.image.grammar import U32, U64, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel.creds import CAP_WAKE_ALARM
from ckptd.kernel.fdinfo import read_fdinfo
from ckptd.kernel.timerfd import (
    ALARM_CLOCKS,
    CLOCK_BOOTTIME_ALARM,
    CLOCK_REALTIME_ALARM,
    TFD_CLOEXEC,
    TFD_TIMER_ABSTIME,
    Setting,
    set_ticks,
    timerfd_create,
    timerfd_gettime,
    timerfd_settime,
)
from ckptd.objects.files.base import Content, FileLookup, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.support import Support

_LINK = 'anon_inode:[timerfd]'
_WALL = (time.CLOCK_REALTIME, CLOCK_REALTIME_ALARM)


@layout
class Timerfd(Struct):
    """A timerfd. Times are in nanoseconds."""
    clock: U32    # clockid_t
    flags: U32    # TFD_TIMER_* that it was set with
    ticks: U64    # expirations not yet read
    interval: U64
    value: U64    # time until it expires, 0 if it is not armed
    now: U64      # CLOCK_REALTIME at that moment


class TimerfdKind(Kind[Timerfd], tag='timerfd'):
    support = Support('timers as files (timerfd)', user='alarm clocks are refused')

    def matches(self, file: OpenFile) -> bool:
        return file.link == _LINK and not file.is_path

    def dump(self, file: OpenFile, content: Content) -> Timerfd:
        # The kernel stops an interval timer that has expired until it is read, and fdinfo then shows no time left.
        # After timerfd_gettime(2) the kernel counts the missed expirations and continues the timer, which a reader
        # cannot notice.
        with file.duplicate() as fd:
            setting, now = timerfd_gettime(fd), time.time_ns()
        fields = read_fdinfo(file.tid, file.fd).fields
        flags = fields['settime'][0].removeprefix('flags:')     # 'settime flags: 01', octal
        return Timerfd(int(fields['clockid'][0]), int(flags, 8), int(fields['ticks'][0]), setting.interval,
                       setting.value, now)

    def restart_findings(self, record: Timerfd, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        if record.clock not in ALARM_CLOCKS or lookup.capable(CAP_WAKE_ALARM):
            return []
        return [finding('EPERM', f'a timerfd of {ALARM_CLOCKS[record.clock]} wakes a suspended machine, which needs '
                        'CAP_WAKE_ALARM', 'restore it as root')]

    def create(self, record: Timerfd, saved: SavedFile, ctx: RestoreContext) -> int:
        fd = -1
        try:
            fd = timerfd_create(record.clock, TFD_CLOEXEC | saved.flags & os.O_NONBLOCK)
            self._arm(record, fd)
            if record.ticks:
                set_ticks(fd, record.ticks)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise CkptError(f'a timerfd of clock {record.clock} cannot be set again: {error.strerror}',
                            errno=error.errno, resource=saved.link) from error
        return fd

    def _arm(self, record: Timerfd, fd: int) -> None:
        """Arm the timer with its flags. It continues with the remaining time; one that was set to a time of day expires
        at that time."""
        value = record.value
        if value and record.flags & TFD_TIMER_ABSTIME:
            value += record.now if record.clock in _WALL else time.clock_gettime_ns(
                time.CLOCK_BOOTTIME if record.clock == CLOCK_BOOTTIME_ALARM else record.clock)
        if record.flags or value or record.interval:
            timerfd_settime(fd, record.flags, Setting(record.interval, value))
