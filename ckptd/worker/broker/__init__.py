# SPDX-License-Identifier: LGPL-2.1-or-later
"""Separate privileges: a job of an ordinary user is done by a worker that is that user.

    daemon (root) -- socket -- broker (root, one per job) -- socket -- worker (the user)

    identity.py     whose rights a job is done with, and taking them for good: the launcher
    calls.py        the table of what a broker does for its worker
    powers.py       how it does that; each call is checked against the job
    process.py      the broker: starts the worker, passes messages on, answers calls, cleans up
    client.py       the worker's end of the calls

The kernel decides about everything else, at the very call, as for any program of that user.
"""
