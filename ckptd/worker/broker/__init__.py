# SPDX-License-Identifier: LGPL-2.1-or-later
"""Separate privileges: a job of an ordinary user is done by a worker that is that user.

    daemon (root) -- socket -- broker (root, one per job) -- socket -- worker (the user)

    identity.py     the rights with which a job is done, and taking them for good: the launcher
    answers.py      the calls that a broker answers; each is checked against the job
    placement.py    the cgroups of a restored tree
    process.py      the broker: starts the worker, passes messages on, answers calls, cleans up

The calls are in ckptd.protocol.broker_calls, the worker's end of them in ckptd.operation.broker. The kernel decides
about everything else, at each system call, as for any program of that user.
"""
