# SPDX-License-Identifier: LGPL-2.1-or-later
"""Plain Python values and what the wire layer takes: variants are unwrapped on the way in, made on the way out.

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
    """The complete types of a signature: 'sa{sv}' -> ['s', 'a{sv}']. ValueError for what is none."""
    return [kind.signature for kind in parse_signature(signature)]


def to_body(signature: str, values: Iterable[Any], types: Mapping[str, str] = NO_TYPES) -> list[Any]:
    """Plain values as a message body of that signature."""
    return [_wrap(kind, value, types) for kind, value in zip(parse_signature(signature), values, strict=True)]


def to_variant(value: Any, signature: str = '', types: Mapping[str, str] = NO_TYPES) -> Variant:
    """One plain value as a variant, its type guessed where none is given."""
    if isinstance(value, Variant):
        return value
    kind = parse_signature(signature or _guess(value))[0]
    return Variant(kind, _wrap(kind, value, types))


def to_variants(row: Mapping[str, Any], types: Mapping[str, str] = NO_TYPES) -> dict[str, Variant]:
    """A plain dict as a{sv}. A value of None says that there is none: its key is left out."""
    return {key: to_variant(value, types.get(key, ''), types) for key, value in row.items() if value is not None}


def is_large(value: Any, most: int) -> bool:
    """Whether there are more than so many values in it, however deep."""
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
    """The same value with each UnixFd in it as its index into `fds`, to which they are added. It stays a UnixFd."""
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
    """A str that D-Bus can carry: bytes of a path that were no UTF-8, and NUL, become visible escapes."""
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
