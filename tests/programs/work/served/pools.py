# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pools of processes in Python that others have made: loky, dask, and the kernel of a Jupyter notebook."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import joblib
import loky
from base import Served, is_
from distributed import Client, LocalCluster
from jupyter_client.manager import KernelManager


class Loky(Served):
    """Its workers take their tasks from a queue with named semaphores."""

    def start(self) -> None:
        self.pool = loky.get_reusable_executor(max_workers=2, timeout=10_000)
        self.pids = set(self.pool.map(pid_of_a_worker, range(8)))

    def use(self, number: int) -> None:
        is_(list(self.pool.map(abs, range(-number, 0))), list(range(number, 0, -1)))
        assert set(self.pool.map(pid_of_a_worker, range(8))) <= self.pids


class Joblib(Served):
    """Its own pool of workers, which is kept from one use to the next."""

    def start(self) -> None:
        self.pool = joblib.Parallel(n_jobs=2)
        self.pool.__enter__()
        self.pids = set(self.do(pid_of_a_worker, range(8)))

    def do(self, function: Callable[[int], int], tasks: Iterable[int]) -> list[int]:
        return list(self.pool(joblib.delayed(function)(task) for task in tasks))

    def use(self, number: int) -> None:
        is_(self.do(abs, range(-number, 0)), list(range(number, 0, -1)))
        assert set(self.do(pid_of_a_worker, range(8))) <= self.pids


def pid_of_a_worker(_: int) -> int:
    time.sleep(0.01)
    return os.getpid()


class Dask(Served):
    """A scheduler, a nanny and two workers; results stay in the cluster."""

    def start(self) -> None:
        self.cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host='127.0.0.1')
        self.client = Client(self.cluster)
        self.total = self.client.submit(int, 0)
        is_(self.total.result(), 0)
        self.workers = set(self.client.scheduler_info()['workers'])

    def use(self, number: int) -> None:
        self.total = self.client.submit(lambda total, more: total + more, self.total, number)
        is_(self.total.result(timeout=60), number * (number + 1) // 2)
        is_(self.client.gather(self.client.map(abs, range(-10, 0))), list(range(10, 0, -1)))
        is_(set(self.client.scheduler_info()['workers']), self.workers)


class Jupyter(Served):
    """The kernel of a notebook and its client, over five TCP connections of ZeroMQ."""

    def start(self) -> None:
        os.environ.update(HOME=str(Path.cwd()), JUPYTER_RUNTIME_DIR=str(Path.cwd()), IPYTHONDIR=str(Path.cwd()))
        self.kernel = KernelManager()
        self.kernel.start_kernel()
        self.client = self.kernel.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        self.said('count = 0')

    def said(self, code: str) -> str:
        words: list[str] = []

        def hook(message: dict[str, Any]) -> None:
            if message['msg_type'] == 'stream':
                words.append(message['content']['text'])
        reply = self.client.execute_interactive(code, timeout=60, output_hook=hook)
        is_(reply['content']['status'], 'ok')
        return ''.join(words)

    def use(self, number: int) -> None:
        is_(self.said('count += 1; print(count)'), f'{number}\n')
        assert self.client.is_alive()
