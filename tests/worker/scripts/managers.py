# SPDX-License-Identifier: LGPL-2.1-or-later
"""multiprocessing: a fork server, a manager with shared objects, and workers with queues. They use unix sockets with
names, and pass files over them."""

import multiprocessing
import os
import sys
from multiprocessing import queues
from pathlib import Path

from victim import ready, wait_for_go


def work(questions: 'queues.Queue[int]', answers: 'queues.Queue[int]') -> None:
    while (number := questions.get()) >= 0:
        answers.put(number * 2)


def main() -> None:
    os.environ['TMPDIR'] = str(Path.cwd())
    context = multiprocessing.get_context('forkserver')
    with context.Manager() as manager:
        shared, events = manager.dict({'before': 1}), manager.list()
        questions, answers = context.Queue(), context.Queue()
        workers = [context.Process(target=work, args=(questions, answers)) for _ in range(2)]
        for worker in workers:
            worker.start()
        questions.put(1)
        assert answers.get() == 2
        events.append('first')
        ready()
        wait_for_go()
        assert dict(shared) == {'before': 1}
        shared['after'] = 2
        events.append('second')
        assert list(events) == ['first', 'second']
        for number in range(20):
            questions.put(number)
        assert sorted(answers.get() for _ in range(20)) == [2 * number for number in range(20)]
        late = context.Process(target=work, args=(questions, answers))     # the fork server makes another one
        late.start()
        workers.append(late)
        for _ in workers:
            questions.put(-1)
        for worker in workers:
            worker.join(30)
            assert worker.exitcode == 0
    sys.stdout.flush()


if __name__ == '__main__':
    main()
