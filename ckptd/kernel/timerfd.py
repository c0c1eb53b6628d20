# SPDX-License-Identifier: LGPL-2.1-or-later
"""timerfd_create(2) and its calls, which Python has from 3.13 on."""

import ctypes
import fcntl
import os
import struct
from typing import NamedTuple

from ckptd.kernel.decl import IOW, c_int, c_void_p, libc

CLOCK_REALTIME_ALARM, CLOCK_BOOTTIME_ALARM = 8, 9       # <linux/time.h>
# they wake a suspended machine and need CAP_WAKE_ALARM (timer_create(2))
ALARM_CLOCKS = {CLOCK_REALTIME_ALARM: 'CLOCK_REALTIME_ALARM', CLOCK_BOOTTIME_ALARM: 'CLOCK_BOOTTIME_ALARM'}
TFD_CLOEXEC, TFD_NONBLOCK = os.O_CLOEXEC, os.O_NONBLOCK
TFD_TIMER_ABSTIME = 1
TFD_TIMER_CANCEL_ON_SET = 2
TFD_IOC_SET_TICKS = IOW('T', 0, 8)
_SECOND = 10**9

_ITIMERSPEC = struct.Struct('=qqqq')        # it_interval, it_value


class Setting(NamedTuple):
    """A setting in nanoseconds. value: time until it expires, 0 if it is not armed."""
    interval: int
    value: int


@libc
def timerfd_create(clockid: c_int, flags: c_int) -> c_int: ...


@libc
def _timerfd_settime(fd: c_int, flags: c_int, new_value: c_void_p, old_value: c_void_p = None) -> c_int: ...


@libc
def _timerfd_gettime(fd: c_int, curr_value: c_void_p) -> c_int: ...


def timerfd_settime(fd: int, flags: int, setting: Setting) -> None:
    spec = _ITIMERSPEC.pack(*divmod(setting.interval, _SECOND), *divmod(setting.value, _SECOND))
    _timerfd_settime(fd, flags, spec)


def timerfd_gettime(fd: int) -> Setting:
    """Read a setting like timerfd_gettime(2). For an interval timer that has expired unread, the kernel counts the
    expirations up to now."""
    spec = ctypes.create_string_buffer(_ITIMERSPEC.size)
    _timerfd_gettime(fd, spec)
    seconds, interval, until, value = _ITIMERSPEC.unpack(spec.raw)
    return Setting(seconds * _SECOND + interval, until * _SECOND + value)


def set_ticks(fd: int, ticks: int) -> None:
    """Make the timer readable with this many expirations. OSError ENOTTY without CONFIG_CHECKPOINT_RESTORE."""
    fcntl.ioctl(fd, TFD_IOC_SET_TICKS, struct.pack('=Q', ticks))
