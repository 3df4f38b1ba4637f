"""Look at the objects of other people's packages, which may run any code, fail, or never return."""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

ATTRIBUTE_SECONDS = 5  # that the look-up of an attribute may take


class TookTooLong(BaseException):
    """Raised where foreign code runs; no `except Exception` there stops it."""


def interrupt(*_: object) -> None:
    raise TookTooLong


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TookTooLong in the block after `seconds`, and every second from then on.

    For the main thread. It ends Python code and system calls, not a loop in compiled code.
    """
    signal.signal(signal.SIGALRM, interrupt)  # again each time: a package may have set its own
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def describe(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:100].rstrip(": ")


def is_a(value: object, kind: type | tuple[type, ...]) -> bool:
    """`isinstance` by the real type: a proxy's `__class__` may run code, and fail."""
    return issubclass(type(value), kind)


def attribute(value: object, name: str) -> object:
    """An attribute of a foreign object, or None where the look-up fails or takes too long.

    As in `time_limit`, whose handler it needs, but many times as fast.
    """
    signal.setitimer(signal.ITIMER_REAL, ATTRIBUTE_SECONDS, 1)
    try:
        return getattr(value, name, None)
    except BaseException:
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def own_attributes(value: object) -> Mapping:
    """`vars`, or nothing where that fails."""
    attributes = attribute(value, "__dict__")
    return attributes if is_a(attributes, (dict, MappingProxyType)) else {}


def base_classes(value: type) -> tuple[type, ...]:
    """The classes from which a class inherits, the nearest first."""
    return type.__dict__["__mro__"].__get__(value)[1:]
