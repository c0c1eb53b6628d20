# SPDX-License-Identifier: LGPL-2.1-or-later
"""Requests of tests, by the name of their operation."""

from typing import Any, get_args

from ckptd.protocol.requests import Request, operation_of

KINDS = {operation_of(kind): kind for kind in get_args(Request)}


def make_request(operation: str, defaults: dict[str, Any], **fields: Any) -> Request:
    """A request with these fields, and those of the defaults that requests for the operation have."""
    kind = KINDS[operation]
    known = {name: value for name, value in defaults.items() if name in kind.__struct_fields__}
    return kind(**{**known, **fields})
