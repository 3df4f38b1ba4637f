"""Whether the values that a file gives a dataclass are what its fields say."""

from dataclasses import fields
from typing import get_args, get_origin

LIMIT = 2**31

SHAPE = (  # of a model, as each params.json says it
    "dim",
    "n_layers",
    "head_dim",
    "hidden_dim",
    "n_heads",
    "n_kv_heads",
    "norm_eps",
    "vocab_size",
    "rope_theta",
)


def check_values(config: object, may_be_zero: set[str], limits: dict[str, int]) -> None:
    """Raise ValueError, which names the field, where a value is not of its field's type, or is a
    number that is not above 0, or at its limit or beyond, by default at `LIMIT`.

    config: a dataclass, of fields such as int, float, bool, str, dict, list[int] or `int | None`.
    may_be_zero: fields whose numbers may be 0.
    """
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        smallest = 0 if name in may_be_zero else None
        kinds = get_args(field.type) if type(None) in get_args(field.type) else (field.type,)
        if not any(is_of(kind, value, smallest, limits.get(name, LIMIT)) for kind in kinds):
            raise ValueError(f"{name} is {value!r}")


def is_of(kind: type, value: object, smallest: int | None, limit: int) -> bool:
    """Whether `value` is of this type; a number is to be above 0, or at least `smallest`, and below
    `limit`.
    """
    if get_origin(kind) is list:
        (kind_of_each,) = get_args(kind)
        return isinstance(value, list) and all(
            is_of(kind_of_each, each, smallest, limit) for each in value
        )
    if kind not in (int, float):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        return False
    return (value > 0 if smallest is None else value >= smallest) and value < limit
