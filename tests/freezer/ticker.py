# SPDX-License-Identifier: LGPL-2.1-or-later
"""A tree that counts: process number N of it adds to the Nth 64-bit number of a shared file, a thousand times a second.

    ticker.py SHARED_FD READY_FD CHILDREN [churn | threads | stuck | vfork]

READY_FD gets a byte from each process. What the children do besides, or the root for `threads`, `stuck` and `vfork`:
churn: fork children that end at once. threads: two more threads count. stuck: it sleeps in state D, in a page fault
under mlock(2) that nobody answers. vfork: it waits for a child that it made with vfork(2).
"""

import ctypes
import fcntl
import mmap
import os
import signal
import struct
import sys
import threading
import time

NR_USERFAULTFD = 323
UFFDIO_API, UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
NR_CLONE, CLONE_VFORK = 56, 0x4000

shared_fd, ready_fd, children = map(int, sys.argv[1:4])
how = sys.argv[4] if len(sys.argv) > 4 else ''
libc = ctypes.CDLL(None, use_errno=True)
counters = memoryview(mmap.mmap(shared_fd, 4096)).cast('Q')


def count(slot: int) -> None:
    os.write(ready_fd, b'r')
    while True:
        counters[slot] += 1
        if how == 'churn' and slot and os.fork() == 0:
            os._exit(0)
        if how == 'churn' and slot:
            os.wait()
        else:
            time.sleep(0.001)


def get_stuck() -> None:
    """Fault a page of a region whose faults a userfaultfd is to answer: mlock(2) waits in TASK_KILLABLE."""
    fd = libc.syscall(NR_USERFAULTFD, os.O_CLOEXEC)
    if fd < 0:
        sys.exit(77)
    fcntl.ioctl(fd, UFFDIO_API, bytearray(struct.pack('3Q', 0xAA, 0, 0)))
    region = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    fcntl.ioctl(fd, UFFDIO_REGISTER, bytearray(struct.pack('4Q', address, mmap.PAGESIZE, 1, 0)))
    os.write(ready_fd, b'r')
    libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE))


def wait_in_vfork() -> None:
    """The child of a vfork(2) sleeps. CLONE_VM is left out: Python would not survive a child in its memory."""
    if libc.syscall(NR_CLONE, CLONE_VFORK | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        os.write(ready_fd, b'r')
        signal.pause()
        os._exit(0)


for number in range(1, children + 1):
    if os.fork() == 0:
        count(number)
if how == 'threads':
    for number in (1, 2):
        threading.Thread(target=count, args=(number,), daemon=True).start()
if how == 'stuck':
    get_stuck()
elif how == 'vfork':
    wait_in_vfork()
else:
    count(0)
