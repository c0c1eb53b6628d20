# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Python program at work: threads, a subprocess on pipes, a queue, files, a clock; the state must add up after it."""

import hashlib
import queue
import subprocess
import threading
import time
from pathlib import Path

from victim import not_the_one_to_report, ready, wait_for_go

SERVER = 'import sys\nfor line in sys.stdin: print(int(line) * 2, flush=True)'
stop = threading.Event()
numbers: 'queue.Queue[int]' = queue.Queue()
rounds = [0] * 4


def work(number: int) -> None:
    digest = hashlib.sha256()
    while not stop.is_set():
        digest.update(number.to_bytes(4, 'little'))
        rounds[number] += 1
    again = hashlib.sha256(number.to_bytes(4, 'little') * rounds[number])
    assert digest.digest() == again.digest(), f'thread {number} lost a round'
    numbers.put(number)


def main() -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(rounds))]
    data = {number: str(number) * 10 for number in range(20000)}
    with Path('journal').open('w+') as journal, subprocess.Popen(
            ['python3', '-c', SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            preexec_fn=not_the_one_to_report, close_fds=False) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        for thread in threads:
            thread.start()
        journal.write('before\n')
        server.stdin.write('20\n')
        server.stdin.flush()
        assert server.stdout.readline() == '40\n'
        server.stdin.write('21\n')      # the answer lies in the pipe while we wait
        server.stdin.flush()
        started = time.monotonic()
        ready()
        wait_for_go()
        assert time.monotonic() >= started
        assert server.stdout.readline() == '42\n'
        server.stdin.write('50\n')
        server.stdin.flush()
        assert server.stdout.readline() == '100\n'
        journal.write('after\n')
        journal.seek(0)
        assert journal.read() == 'before\nafter\n'
        server.stdin.close()
    before = list(rounds)
    while any(now == then for now, then in zip(rounds, before, strict=True)):
        time.sleep(0)
    stop.set()
    for thread in threads:
        thread.join()
    assert sorted(numbers.get_nowait() for _ in threads) == [0, 1, 2, 3]
    assert data == {number: str(number) * 10 for number in range(20000)}
    assert server.returncode == 0


if __name__ == '__main__':
    main()
