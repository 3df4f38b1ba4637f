"""Rotary positions: the frequencies, scaled for a longer context or not, and tables of cosines and
sines.

Sources: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021; "linear":
Chen et al., "Extending Context Window of Large Language Models via Position Interpolation", 2023;
"yarn": Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023;
"llama3": Llama 3.1's release. The pairs are neighbouring channels (interleaved, "traditional"), as
Meta's checkpoints need.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from parts import device  # noqa: F401  before MLX, for its BLAS

import mlx.core as mx

ORIGINAL_CONTEXT = "original_max_position_embeddings"
NEEDED = {  # by each kind of scaling, in Hugging Face's words
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL_CONTEXT),
    "yarn": ("factor", ORIGINAL_CONTEXT),
}
OPTIONAL = {
    "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
}
SMALLEST, LARGEST = 1e-6, 1e9  # of the numbers that describe a scaling


class Rope(NamedTuple):
    """What decides the angles: the channels of a head, the base of the wavelengths, and the sorted
    items of the scaling's description, none where positions are not scaled.
    """

    head_dim: int
    theta: float
    scaling: tuple[tuple[str, object], ...] = ()


def make_rope(head_dim: int, theta: float, scaling: dict | None, context: int | None) -> Rope:
    """The `Rope` of a model. scaling: of config.json (`rope_scaling`), or None; context: the
    positions that it is made for, which are the original ones where `scaling` does not tell.

    Raises ValueError where the scaling is of an unknown kind, or lacks a value.
    """
    if theta <= 1:
        raise ValueError(f"rope_theta is {theta}, and not above 1")
    if scaling is None:
        return Rope(head_dim, theta)
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
    if kind not in NEEDED:
        known = ", ".join(NEEDED)
        raise ValueError(f"rope_scaling is {scaling!r}, of which rope_type is none of {known}")
    if kind == "default":
        return Rope(head_dim, theta)
    values = {ORIGINAL_CONTEXT: context, **scaling}
    used = {"rope_type": kind}
    for name in NEEDED[kind] + OPTIONAL.get(kind, ()):
        value = values.get(name)
        if name not in NEEDED[kind] and not value and value is not False:
            continue  # none, or zero, is the default
        is_number = isinstance(value, (int, float)) and SMALLEST <= value <= LARGEST
        if not (is_number or (name == "truncate" and value is False)):
            raise ValueError(f"{name} of rope_scaling ({kind}) is {value!r}")
        used[name] = value
    if kind == "llama3" and used["low_freq_factor"] >= used["high_freq_factor"]:
        raise ValueError("low_freq_factor of rope_scaling is not below high_freq_factor")
    return Rope(head_dim, theta, tuple(sorted(used.items())))


def frequencies(rope: Rope) -> np.ndarray:
    """The angle in radians (head_dim / 2) by which one position rotates each pair of channels."""
    plain = rope.theta ** (-np.arange(0, rope.head_dim, 2) / rope.head_dim)
    scaling = dict(rope.scaling)
    if not scaling:
        return plain
    if scaling["rope_type"] == "llama3":
        slowed = slowed_by_wavelength(plain, scaling)
    elif scaling["rope_type"] == "yarn":
        slowed = slowed_by_channel(rope, scaling)
    else:
        slowed = 1.0
    return plain * (1 - slowed) + plain / scaling["factor"] * slowed


def slowed_by_wavelength(plain: np.ndarray, scaling: dict) -> np.ndarray:
    """How much, from 0 to 1, "llama3" slows each pair of channels: not at all where the original
    context holds at least `high_freq_factor` of its rotations, and fully where it holds at most
    `low_freq_factor` of them.
    """
    rotations = scaling[ORIGINAL_CONTEXT] * plain / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    return np.clip((high - rotations) / (high - low), 0, 1)


def slowed_by_channel(rope: Rope, scaling: dict) -> np.ndarray:
    """How much, from 0 to 1, "yarn" slows each pair of channels: a ramp between the pair that
    rotates `beta_fast` times in the original context and the one that rotates `beta_slow` times.
    """

    def pair(rotations: float) -> float:
        wavelength = scaling[ORIGINAL_CONTEXT] / (2 * math.pi * rotations)
        return rope.head_dim / 2 * math.log(wavelength) / math.log(rope.theta)

    first, last = pair(scaling.get("beta_fast", 32)), pair(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.head_dim - 1)
    if first == last:
        last += 0.001  # transformers' own width of a ramp that has none
    return np.clip((np.arange(rope.head_dim // 2) - first) / (last - first), 0, 1)


def amplitude(rope: Rope) -> float:
    """The factor of cosines and sines: 1, but for "yarn", which sharpens attention with it."""
    scaling = dict(rope.scaling)
    if scaling.get("rope_type") != "yarn":
        return 1.0
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])

    def factor(mscale: float) -> float:
        return 1 + 0.1 * mscale * math.log(max(scaling["factor"], 1))

    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return factor(scaling["mscale"]) / factor(scaling["mscale_all_dim"])
    return factor(1)


@lru_cache
def frequency_table(rope: Rope) -> mx.array:
    """`frequencies` as an MLX array (head_dim / 2) of float32, which CUDA's kernels read."""
    return mx.array(frequencies(rope), mx.float32)


@lru_cache
def wavelength_table(rope: Rope) -> mx.array:
    """The reciprocals (head_dim / 2) of `frequencies`, float32, which `mx.fast.rope` takes."""
    return mx.array(1 / frequencies(rope), mx.float32)


@lru_cache(maxsize=2)
def cos_sin(offset: int, length: int, rope: Rope) -> tuple[mx.array, mx.array]:
    """Cosines and sines (length, 1, head_dim), float32, of the angles of the positions from
    `offset` on, times the `amplitude`.
    """
    angles = np.arange(offset, offset + length)[:, None, None]
    angles = angles * frequencies(rope).repeat(2)
    tables = amplitude(rope) * np.cos(angles), amplitude(rope) * np.sin(angles)
    return tuple(mx.array(table, mx.float32) for table in tables)


@lru_cache
def rotate_half_matrix(head_dim: int, dtype: mx.Dtype) -> mx.array:
    """The matrix (head_dim, head_dim) that maps each pair of channels (a, b) to (-b, a)."""
    return mx.array(np.kron(np.eye(head_dim // 2), [[0, 1], [-1, 0]]), dtype)
