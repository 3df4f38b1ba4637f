"""Look at the objects of other people's packages, which may run any code, fail, or never return."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from signal import ITIMER_REAL, SIGALRM, setitimer, signal  # before a package replaces any
from types import ModuleType

ATTRIBUTE_SECONDS = 5  # that the look-up of an attribute may take
MOST_NAMES = 100_000  # of what a module lists


class TookTooLong(BaseException):
    """Raised where foreign code runs; no `except Exception` there stops it."""


def interrupt(*_: object) -> None:
    raise TookTooLong


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TookTooLong in the block after `seconds`, and every second from then on.

    For the main thread. It ends Python code and system calls, not a loop in compiled code.
    """
    signal(SIGALRM, interrupt)  # again each time: a package may have set its own
    setitimer(ITIMER_REAL, max(seconds, 0.001), 1)
    try:
        yield
    finally:
        setitimer(ITIMER_REAL, 0)


def describe(error: BaseException) -> str:
    """What an error says, on one line; its type alone where it fails to say more."""
    says = ""
    with suppress(BaseException):
        says = " ".join(str(error).split())
    return f"{type(error).__name__}: {says}"[:100].rstrip(": ")


def is_a(value: object, kind: type | tuple[type, ...]) -> bool:
    """`isinstance` by the real type: a proxy's `__class__` may run code, and fail."""
    return issubclass(type(value), kind)


def attribute(value: object, name: str) -> object:
    """An attribute of a foreign object, or None where the look-up fails or takes too long.

    As in `time_limit`, whose handler it needs, but many times as fast.
    """
    setitimer(ITIMER_REAL, ATTRIBUTE_SECONDS, 1)
    try:
        return getattr(value, name, None)
    except BaseException:
        return None
    finally:
        setitimer(ITIMER_REAL, 0)


def text_of(value: object) -> str | None:
    """A string as one of Python's own, whose methods run no foreign code; None for all else."""
    return str.__str__(value) if is_a(value, str) else None


def own_attributes(value: object) -> Mapping:
    """What a module or class holds, whatever its `__dict__` says; nothing for anything else, or
    where it does not want to be asked.
    """
    kind = type if is_a(value, type) else ModuleType
    # Asked, since some modules are loaded only then.
    if not is_a(value, kind) or attribute(value, "__dict__") is None:
        return {}
    return kind.__dict__["__dict__"].__get__(value)


def base_classes(value: type) -> tuple[type, ...]:
    """The classes from which a class inherits, the nearest first."""
    return type.__dict__["__mro__"].__get__(value)[1:]


def names_in_all(module: ModuleType) -> list[str]:
    listed = own_attributes(module).get("__all__")
    return names_in(lambda: listed) if is_a(listed, (list, tuple)) else []


def names_in_dir(module: ModuleType) -> list[str]:
    """What a module's own `__dir__` lists."""
    return names_in(attribute(module, "__dir__"))


def names_in(list_names: Callable[[], Iterable]) -> list[str]:
    """The strings that a foreign function lists; none where it fails or takes too long."""
    try:
        with time_limit(ATTRIBUTE_SECONDS):
            names = map(text_of, islice(list_names(), MOST_NAMES))
            return [name for name in names if name is not None]
    except BaseException:
        return []
