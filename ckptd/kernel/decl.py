# SPDX-License-Identifier: LGPL-2.1-or-later
"""C declarations as typed Python: struct layouts by class decorator, functions as stubs with `...` bodies.

    @cstruct(size=16)
    class timespec(ctypes.Structure):
        tv_sec: s64
        tv_nsec: s64

    @libc
    def pidfd_getfd(pidfd: c_int, targetfd: c_int, flags: c_uint = 0) -> c_int: ...

    @syscall(NR['kcmp'])
    def kcmp(pid1: c_int, pid2: c_int, type: c_int, idx1: c_ulong, idx2: c_ulong) -> c_long: ...

-1 becomes OSError "kcmp: Operation not permitted" here and nowhere else.
"""

import ctypes
import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

P = ParamSpec('P')
R = TypeVar('R')
S = TypeVar('S', bound=ctypes.Structure)

# mypy and readers see an int, ctypes sees the C type
u8 = Annotated[int, ctypes.c_uint8]
u16 = Annotated[int, ctypes.c_uint16]
u32 = Annotated[int, ctypes.c_uint32]
u64 = Annotated[int, ctypes.c_uint64]
s16 = Annotated[int, ctypes.c_int16]
s32 = Annotated[int, ctypes.c_int32]
s64 = Annotated[int, ctypes.c_int64]
c_int = Annotated[int, ctypes.c_int]
c_uint = Annotated[int, ctypes.c_uint]
c_long = Annotated[int, ctypes.c_long]
c_ulong = Annotated[int, ctypes.c_ulong]
c_size_t = Annotated[int, ctypes.c_size_t]
c_ssize_t = Annotated[int, ctypes.c_ssize_t]
# a pointer argument takes ctypes.byref(), a buffer or an address
c_void_p = Annotated[Any, ctypes.c_void_p]

_libc = ctypes.CDLL(None, use_errno=True)


def _ctype(annotation: object) -> Any:
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[1]
    return annotation


def cstruct(size: int) -> Callable[[type[S]], type[S]]:
    """Fill `_fields_` from the annotations and check that the layout has `size` bytes."""
    def decorate(cls: type[S]) -> type[S]:
        # ctypes fixes the layout when _fields_ is assigned, so a decorator can do what __init_subclass__ cannot
        hints = get_type_hints(cls, include_extras=True)
        own = [name for name in cls.__annotations__ if not name.startswith('_')]
        cls._fields_ = [(name, _ctype(hints[name])) for name in own]
        if ctypes.sizeof(cls) != size:
            raise TypeError(f'struct {cls.__name__} has {ctypes.sizeof(cls)} bytes, not {size}')
        return cls
    return decorate


def offset_of(cls: type[ctypes.Structure], name: str) -> int:
    """Return the offset of a member (offsetof(3))."""
    return int(getattr(cls, name).offset)


def _fail(name: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f'{name}: {os.strerror(number)}')


def _call_name(fn: Callable[..., Any]) -> str:
    # a stub `_kcmp` leaves the name `kcmp` to the function that wraps it
    return fn.__name__.lstrip('_')


def _stub(call: Any, fn: Callable[P, R], fixed: tuple[Any, ...]) -> Callable[P, R]:
    signature = inspect.signature(fn)
    hints = get_type_hints(fn, include_extras=True)
    call.argtypes = [type(value) for value in fixed] + [_ctype(hints[name]) for name in signature.parameters]
    call.restype = _ctype(hints['return'])
    defaults = [p.default for p in signature.parameters.values()]
    names, required = list(signature.parameters), sum(d is inspect.Parameter.empty for d in defaults)
    name = _call_name(fn)

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) < required:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            args = tuple(bound.arguments[key] for key in names)
        elif len(args) < len(names):
            args = args + tuple(defaults[len(args):])
        result = call(*fixed, *args)
        if result == -1:
            raise _fail(name)
        return result
    return wrapper


def libc(fn: Callable[P, R]) -> Callable[P, R]:
    """Make a libc function from the stub's name and annotations."""
    # a separate prototype, because another stub of the same function may have other types
    pointer = ctypes.cast(getattr(_libc, _call_name(fn)), ctypes.c_void_p).value
    return _stub(_prototype(pointer), fn, ())


def syscall(number: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a system call for which libc, or an old libc, has no wrapper."""
    def decorate(fn: Callable[P, R]) -> Callable[P, R]:
        pointer = ctypes.cast(_libc.syscall, ctypes.c_void_p).value
        return _stub(_prototype(pointer), fn, (ctypes.c_long(number),))
    return decorate


def _prototype(pointer: int | None) -> Any:
    return ctypes.CFUNCTYPE(ctypes.c_long, use_errno=True)(pointer or 0)


def _ioc(direction: int, type_: str, number: int, size: int) -> int:
    """Compute an ioctl number (<asm-generic/ioctl.h>). direction: 1 write, 2 read, 3 both."""
    return direction << 30 | size << 16 | ord(type_) << 8 | number


def IO(type_: str, number: int) -> int:
    return _ioc(0, type_, number, 0)


def IOW(type_: str, number: int, size: int) -> int:
    return _ioc(1, type_, number, size)


def IOR(type_: str, number: int, size: int) -> int:
    return _ioc(2, type_, number, size)


def IOWR(type_: str, number: int, size: int) -> int:
    return _ioc(3, type_, number, size)
