# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names on the bus, shared by daemon and clients."""

BUS_NAME = 'org.ckptd1'
ROOT = '/org/ckptd1'
MANAGER = 'org.ckptd1.Manager'
JOB = 'org.ckptd1.Job'
IMAGE = 'org.ckptd1.Image'


def job_path(number: int) -> str:
    return f'{ROOT}/job/{number}'


def image_path(image: str) -> str:
    """Image ids are made of [a-z0-9_], so an id is a path element as it is."""
    return f'{ROOT}/image/{image}'
