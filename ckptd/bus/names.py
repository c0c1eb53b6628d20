# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names on the bus, shared by daemon and clients."""

BUS_NAME = 'org.ckptd1'
ROOT = '/org/ckptd1'
MANAGER = 'org.ckptd1.Manager'
JOB = 'org.ckptd1.Job'
IMAGE = 'org.ckptd1.Image'
NODES = (f'{ROOT}/job', f'{ROOT}/image')        # above the objects of everybody


def job_path(number: int) -> str:
    return f'{ROOT}/job/{number}'


def token_path(sender: str, token: str) -> str:
    """Where the job of a call with the option handle_token is. Known before the call, so subscribing cannot race.

    sender: unique name of the caller, ':1.42'. Never the path of a number, for there are two numbers in it.
    """
    return f'{ROOT}/job/{sender[1:].replace(".", "_")}_{token}'


def image_path(image: str) -> str:
    """Image ids are made of [a-z0-9_], so an id is a path element as it is."""
    return f'{ROOT}/image/{image}'
