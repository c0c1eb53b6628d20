# SPDX-License-Identifier: LGPL-2.1-or-later
"""Requests as messages: each operation has one kind of request, with its own fields."""

from typing import Any, get_args

import msgspec
import pytest

from ckptd.protocol.messages import Start, ToWorker
from ckptd.protocol.requests import Caller, CheckpointRequest, JobRequest, Operation, Request, operation_of
from ckptd.target import CgroupTarget, ProcessTarget
from tests.lib.requests import KINDS, make_request

CALLER = Caller(1000, 1000, (4, 24), pid=7)
FIELDS: dict[str, Any] = {'caller': CALLER, 'spool': '/spool', 'runtime': '/run', 'target': CgroupTarget('/a'),
                          'image': 'an_image', 'dumped': 'a.service', 'format': 'tar', 'size_limit': 7}


def sent(fields: dict[str, Any]) -> Any:
    """What the worker reads of a Start with these fields of a request."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode({'type': 'Start', 'request': fields}), type=ToWorker)


def fields_of(request: Request) -> dict[str, Any]:
    return dict(msgspec.msgpack.decode(msgspec.msgpack.encode(request)))


def test_each_operation_has_one_request() -> None:
    assert sorted(KINDS) == sorted(get_args(Operation))
    assert len(KINDS) == len(get_args(Request))


@pytest.mark.parametrize('operation', get_args(Operation))
def test_a_request_arrives_as_it_was_sent(operation: Operation) -> None:
    request = make_request(operation, FIELDS, asker=1001)
    assert isinstance(request, JobRequest)
    assert (request.operation, operation_of(type(request)), request.asked_by) == (operation, operation, 1001)
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(Start(request)), type=ToWorker)
    assert received == Start(request)


def test_what_a_request_is_about() -> None:
    assert [(request.about, request.image_id) for request in (
        make_request(operation, FIELDS) for operation in ('scan', 'checkpoint', 'restore', 'import', 'recover'))] == [
        ('cgroup:/a', ''), ('cgroup:/a', 'an_image'), ('a.service', 'an_image'), ('', ''), ('', '')]


def test_who_asked() -> None:
    assert make_request('scan', FIELDS).asked_by == 1000
    assert make_request('scan', FIELDS, asker=0).asked_by == 0


@pytest.mark.parametrize(('operation', 'change'), [
    ('export', {'format': 'zip'}), ('checkpoint', {'after': 'stop'}), ('checkpoint', {'freeze': 'never'}),
    ('restore', {'changed_files': 'maybe'}), ('checkpoint', {'target': {'type': 'unit', 'name': 'foo.bar'}}),
    ('freeze', {'target': {'type': 'self'}}), ('scan', {'target': 'pid:1'}), ('import', {'size_limit': 'all'}),
    ('scan', {'operation': 'remove'}), ('restore', {'wait': 1}),
])
def test_a_wrong_value_is_no_message(operation: str, change: dict[str, Any]) -> None:
    fields = fields_of(make_request(operation, FIELDS))
    assert isinstance(sent(fields), Start)
    with pytest.raises(msgspec.ValidationError):
        sent({**fields, **change})


@pytest.mark.parametrize(('operation', 'name'), [
    ('checkpoint', 'target'), ('checkpoint', 'image'), ('restore', 'image'), ('import', 'size_limit'),
    ('export', 'format'), ('scan', 'caller')])
def test_a_request_without_what_it_needs_is_no_message(operation: str, name: str) -> None:
    fields = fields_of(make_request(operation, FIELDS))
    del fields[name]
    with pytest.raises(msgspec.ValidationError, match=name):
        sent(fields)


def test_fields_of_another_operation_are_not_taken() -> None:
    fields = fields_of(make_request('scan', FIELDS))
    start = sent({**fields, 'as_root': True, 'image': 'x'})
    assert start == Start(make_request('scan', FIELDS))
    with pytest.raises(TypeError):
        make_request('scan', FIELDS, as_root=True)


def test_a_checkpoint_is_of_a_tree() -> None:
    request = make_request('checkpoint', {**FIELDS, 'target': ProcessTarget(7)})
    assert isinstance(request, CheckpointRequest)
    assert request.about == 'pid:7'
