# SPDX-License-Identifier: LGPL-2.1-or-later
"""Conversion between plain Python values and those of the wire layer. Variants are unwrapped on the way in and made on
the way out.

    s, o, g  str        b  bool       y n q i u x t  int       d  float       ay  bytes
    h  Fd     (...)  list or tuple, list on the way in       a{..}  dict   other arrays  list       v  the value alone

A variant on the way out gets its type from a type map by key ({'pid': 'u'}), else from the value: bool b, int t (x if
negative), Fd h, float d, str s, bytes ay, dict a{sv}, a list by its items (av if they differ), an empty list as.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ckptd.bus.message import UnixFd
from ckptd.bus.wire import SignatureType, Variant, parse_signature

NO_TYPES: Mapping[str, str] = {}


def split_signature(signature: str) -> list[str]:
    """Split a signature into its complete types: 'sa{sv}' -> ['s', 'a{sv}']. ValueError for an invalid one."""
    return [kind.signature for kind in parse_signature(signature)]


def to_body(signature: str, values: Iterable[Any], types: Mapping[str, str] = NO_TYPES) -> list[Any]:
    """Convert plain values to a message body of that signature."""
    return [_wrap(kind, value, types) for kind, value in zip(parse_signature(signature), values, strict=True)]


def to_variant(value: Any, signature: str = '', types: Mapping[str, str] = NO_TYPES) -> Variant:
    """Convert one plain value to a variant. Its type is guessed if none is given."""
    if isinstance(value, Variant):
        return value
    kind = parse_signature(signature or _guess(value))[0]
    return Variant(kind, _wrap(kind, value, types))


def to_variants(row: Mapping[str, Any], types: Mapping[str, str] = NO_TYPES) -> dict[str, Variant]:
    """Convert a plain dict to a{sv}. A key whose value is None is left out."""
    return {key: to_variant(value, types.get(key, ''), types) for key, value in row.items() if value is not None}


def is_large(value: Any, most: int) -> bool:
    """Whether the value has more than `most` values in it, at any depth."""
    count, todo = 0, [value]
    while todo and count <= most:
        one = todo.pop()
        count += 1
        match one:
            case Variant():
                todo.append(one.value)
            case dict():
                todo.extend(one.values())
            case list() | tuple():
                todo.extend(one)
    return count > most


def index_fds(value: Any, fds: list[int]) -> Any:
    """Return the value with each UnixFd in it replaced by its index into `fds`, to which the fds are added. The index
    stays a UnixFd."""
    match value:
        case UnixFd():
            fds.append(int(value))
            return UnixFd(len(fds) - 1)
        case dict():
            return {key: index_fds(item, fds) for key, item in value.items()}
        case list() | tuple():
            return [index_fds(item, fds) for item in value]
    return value


def to_text(value: str) -> str:
    """Return a str that D-Bus can carry. Bytes that are not UTF-8, and NUL, become visible escapes."""
    if value.isascii() and '\0' not in value:
        return value
    return value.replace('\0', '\\x00').encode('utf-8', 'backslashreplace').decode()


def _guess(value: Any) -> str:
    if isinstance(value, bool):
        return 'b'
    if isinstance(value, UnixFd):
        return 'h'
    if isinstance(value, int):
        return 't' if value >= 0 else 'x'
    if isinstance(value, (list, tuple, set, frozenset)):
        return 'a' + _common({_guess(item) for item in value})
    for kind, signature in ((str, 's'), (float, 'd'), (bytes, 'ay'), (Mapping, 'a{sv}')):
        if isinstance(value, kind):
            return signature
    raise TypeError(f'no D-Bus type for {type(value).__name__}')


def _common(kinds: set[str]) -> str:
    if not kinds:
        return 's'
    return kinds.pop() if len(kinds) == 1 else 'v'


def _wrap(kind: SignatureType, value: Any, types: Mapping[str, str]) -> Any:
    token = kind.token
    if token == 's':
        return to_text(value)
    if token == 'v':
        return to_variant(value, '', types)
    if token == '(':
        return [_wrap(child, item, types) for child, item in zip(kind.children, value, strict=True)]
    if token != 'a':
        return value
    child = kind.children[0]
    if child.token == 'y':
        return bytes(value)
    if child.token != '{':
        return [_wrap(child, item, types) for item in value]
    if kind.signature == 'a{sv}':
        return to_variants(value, types)
    return {_wrap(child.children[0], key, types): _wrap(child.children[1], item, types) for key, item in value.items()}
