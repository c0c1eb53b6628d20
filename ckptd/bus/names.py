# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names on the bus, shared by daemon and clients."""

BUS_NAME = 'org.ckptd1'
ROOT = '/org/ckptd1'
MANAGER = 'org.ckptd1.Manager'
JOB = 'org.ckptd1.Job'
IMAGE = 'org.ckptd1.Image'
NODES = (f'{ROOT}/job', f'{ROOT}/image')        # nodes above the objects of all users


def job_path(number: int) -> str:
    return f'{ROOT}/job/{number}'


def token_path(sender: str, token: str) -> str:
    """Return the path of a job whose call has the option handle_token. It is known before the call, so that a client
    can subscribe first.

    sender: unique name of the caller, ':1.42'. The path contains two numbers, so it never equals the path of a job
    number.
    """
    return f'{ROOT}/job/{sender[1:].replace(".", "_")}_{token}'


def image_path(image: str) -> str:
    """Return the path of an image. Ids consist of [a-z0-9_], so an id is a path element as it is."""
    return f'{ROOT}/image/{image}'
