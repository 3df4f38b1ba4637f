"""The network of Llama 1, Llama 2 and Mistral, with LoRA adapters for its linear layers.

Attributes are named as in Meta's checkpoints, so that the module's parameter paths are the keys of
`weights.npz` (`layers.0.attention.wq.weight`, ...).

Shapes in comments: B rows of a batch, L positions, S positions in the key-value cache, D = `dim`,
H = `n_heads`, K = `n_kv_heads`, V = `vocab_size`.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache, partial

import numpy as np


from parts import device  # before MLX, for its BLAS

import mlx.core as mx
import mlx.nn as nn

LORA_SCALE = 2.0
CACHE_STEP = 512  # positions by which the key-value cache grows
THREADS = 512  # of a CUDA block
SHARED_MEMORY = 80_000  # bytes of dynamic shared memory a block
ATTENTION_MEMORY = 17_000  # bytes of static shared memory for attention, up to a head_dim of 256
MAX_SPLITS = 16  # blocks, at most, that share the positions of one head
QUERY_BLOCK = 128  # positions whose attention a CPU computes at once
# Up to so many rows, MLX's product with quantized weights beats one with dequantized weights.
FEW_ROWS = 2 if device.ON_CPU else 16 if device.has_cuda() else math.inf

# One layer's keys and values (B, K, capacity, head_dim), and how many positions are filled.
LayerCache = tuple[mx.array, mx.array, int]

# -------------------------------------------------------------------------------------------------
# Arithmetic. A CPU spends its time in exponentials, once products are fast: each is computed no
# more often than it must be, and in the cheapest of MLX's ways. A GPU takes MLX's fused kernels.


def exp(x: mx.array) -> mx.array:
    """e to the x, for a CPU: the power, as exact as `mx.exp`, takes a third of its time."""
    return mx.power(math.e, x)


def row_max(x: mx.array) -> mx.array:
    """The highest value along the last axis, which is kept with size 1. A CPU compares rows with
    each other faster than the values of one.
    """
    if x.shape[-1] % 128 == 0:
        x = x.reshape(*x.shape[:-1], -1, 128).max(-2)
    return x.max(-1, keepdims=True)


def row_sum(x: mx.array) -> mx.array:
    """The sum over the last axis, which is kept with size 1; a product is a CPU's fastest way."""
    return x @ column_of_ones(x.shape[-1], x.dtype)


@lru_cache
def column_of_ones(n: int, dtype: mx.Dtype) -> mx.array:
    return mx.array(np.ones((n, 1)), dtype)


# SwiGLU exists twice. A CPU keeps what the gradient needs; for a GPU an exponential costs less than
# to store and fetch it.


@mx.custom_function
def swiglu_on_cpu(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    divisor = 1 + mx.power(1 / math.e, gate)  # exp(-gate), without a pass for the sign
    silu = gate / divisor
    return silu * up, silu, divisor


@swiglu_on_cpu.vjp
def swiglu_on_cpu_vjp(
    primals: tuple[mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array, mx.array],
    outputs: tuple[mx.array, mx.array, mx.array],
) -> tuple[mx.array, mx.array]:
    (_, up), (cotangent, *_), (_, silu, divisor) = primals, cotangents, outputs
    return cotangent * up * (silu + (1 - silu) / divisor), cotangent * silu


@mx.custom_function
def swiglu_on_gpu(gate: mx.array, up: mx.array) -> mx.array:
    return gate / (1 + mx.exp(-gate)) * up


@swiglu_on_gpu.vjp
def swiglu_on_gpu_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    gate, up = primals
    if has_kernels(gate):
        return run_kernel("swiglu_gradients", gate.size // 8, [gate, up, cotangent], 2)
    # `mx.compile` would store what two of its kernels share, so each gradient, and the forward
    # pass, has an expression of its own.
    x = gate.astype(mx.float32)
    sigmoid = 1 / (1 + mx.exp(-x))
    gradient = cotangent * up * (sigmoid + x * sigmoid * (1 - sigmoid))
    return gradient.astype(gate.dtype), cotangent * nn.silu(gate)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up`."""
    return swiglu_on_cpu(gate, up)[0] if device.ON_CPU else swiglu_on_gpu(gate, up)


@mx.custom_function
def cross_entropy_on_cpu(
    logits: mx.array, targets: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    highest = row_max(logits)
    powers = exp(logits - highest)
    total = row_sum(powers)
    chosen = mx.take_along_axis(logits, targets[..., None], -1)
    return (mx.log(total) + highest - chosen).squeeze(-1), powers, total


@cross_entropy_on_cpu.vjp
def cross_entropy_on_cpu_vjp(
    primals: tuple[mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array, mx.array],
    outputs: tuple[mx.array, mx.array, mx.array],
) -> tuple[mx.array, mx.array]:
    (_, targets), (weights, *_), (_, powers, total) = primals, cotangents, outputs
    gradient = (powers * (weights[..., None] / total)).flatten()
    at_targets = mx.arange(targets.size, dtype=mx.int64) * powers.shape[-1] + targets.flatten()
    gradient = gradient.at[at_targets].subtract(weights.flatten())
    return gradient.reshape(powers.shape), mx.zeros_like(targets)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Minus the log-probability, in nats and float32, of each target.

    logits: (..., V); targets: (...) integer. Gives (...). The gradient is that of softmax, minus
    one at the target.
    """
    if device.ON_CPU:
        return cross_entropy_on_cpu(logits.astype(mx.float32), targets)[0]
    return mx.fast.cross_entropy(logits, targets)


@mx.custom_function
def attend_on_cpu(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    scores = queries @ keys.swapaxes(-1, -2) + mask
    powers = exp(scores - row_max(scores))
    total = row_sum(powers)
    return powers @ values / total, powers, total


@attend_on_cpu.vjp
def attend_on_cpu_vjp(
    primals: tuple[mx.array, mx.array, mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array, mx.array],
    outputs: tuple[mx.array, mx.array, mx.array],
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    queries, keys, values, mask = primals
    out, powers, total = outputs
    cotangent = cotangents[0] / total
    # The sum over a row of weights times their gradients is that of output times its gradient (Dao
    # et al., "FlashAttention", 2022), which has fewer columns.
    gradient = powers * (cotangent @ values.swapaxes(-1, -2) - row_sum(cotangent * out))
    return (
        gradient @ keys,
        gradient.swapaxes(-1, -2) @ queries,
        powers.swapaxes(-1, -2) @ cotangent,
        mx.zeros_like(mask),
    )


@lru_cache(maxsize=16)  # what the layers have in common
def causal_mask(n: int, seen: int, n_sharing: int, dtype: mx.Dtype) -> mx.array:
    """What to add to the scores of the last `n` of `seen` positions, for each of the heads that
    share a key head: (n_sharing * n, seen) of zeros, and of minus infinity where keys come later.
    """
    is_later = np.arange(seen) > np.arange(seen - n, seen)[:, None]
    return mx.array(np.tile(np.where(is_later, -np.inf, 0), (n_sharing, 1)), dtype)


def attend(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
    """Scaled dot-product attention; the last query sees all keys, each earlier one a key fewer.

    queries: (B, H, L, head_dim); keys and values: (B, K, S, head_dim). Gives the queries' shape.
    """
    batch, n_heads, length, head_dim = queries.shape
    n_kv_heads, positions = keys.shape[1:3]
    if not device.ON_CPU:
        mask = "causal" if length > 1 else None
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):  # so that keys which no query sees cost nothing
        block = queries[:, :, start : start + QUERY_BLOCK] * scale
        n = block.shape[2]
        seen = positions - length + start + n
        # The queries that share a key head are one matrix: (B, K, H / K * n, head_dim).
        block = block.reshape(batch, n_kv_heads, -1, head_dim)
        mask = causal_mask(n, seen, n_heads // n_kv_heads, block.dtype)
        out, *_ = attend_on_cpu(block, keys[:, :, :seen], values[:, :, :seen], mask)
        blocks.append(out.reshape(batch, n_heads, n, head_dim))
    return mx.concatenate(blocks, axis=2)


def rotary_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """The angles (head_dim / 2) by which a position turns each pair of channels."""
    return theta ** (-np.arange(0, head_dim, 2) / head_dim)


@lru_cache
def rotary_frequencies_on_gpu(head_dim: int, theta: float) -> mx.array:
    return mx.array(rotary_frequencies(head_dim, theta), mx.float32)


@lru_cache(maxsize=2)
def rotation(offset: int, length: int, head_dim: int, theta: float) -> tuple[mx.array, mx.array]:
    """Cosines and sines (length, 1, head_dim) of the angles by which positions from `offset` on are
    turned.
    """
    frequencies = rotary_frequencies(head_dim, theta).repeat(2)
    angles = np.arange(offset, offset + length)[:, None, None] * frequencies
    return mx.array(np.cos(angles), mx.float32), mx.array(np.sin(angles), mx.float32)


@lru_cache
def right_angle(head_dim: int, dtype: mx.Dtype) -> mx.array:
    """The matrix that maps each pair of channels (a, b) to (-b, a)."""
    return mx.array(np.kron(np.eye(head_dim // 2), [[0, 1], [-1, 0]]), dtype)


@mx.custom_function
def rotate_on_cpu(x: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    return x * cosines + x @ right_angle(x.shape[-1], x.dtype) * sines


@rotate_on_cpu.vjp
def rotate_on_cpu_vjp(
    primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    _, cosines, sines = primals
    tables = mx.zeros_like(cosines), mx.zeros_like(sines)
    return rotate_on_cpu(cotangent, cosines, -sines), *tables  # back by the same angles


def rotate_on_cuda(x: mx.array, offset: int, theta: float) -> mx.array:
    _, length, heads, head_dim = x.shape
    frequencies = rotary_frequencies_on_gpu(head_dim, theta)

    def turn(x: mx.array, direction: int) -> mx.array:
        sizes = length, heads, head_dim, offset, direction
        return run_kernel("rotate", x.size // 8, [x, frequencies], 1, *sizes)[0]

    @mx.custom_function
    def rotated(x: mx.array) -> mx.array:
        return turn(x, 1)

    @rotated.vjp
    def rotated_vjp(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
        return turn(cotangent, -1)

    return rotated(x)


def rotate(x: mx.array, offset: int | mx.array, theta: float, training: bool = False) -> mx.array:
    """Turn each pair of neighbouring channels by an angle that grows with the position.

    x: (B, L, heads, head_dim), the positions from `offset` on, which for one position may be an
    array. Gives the same shape. In `training`, CUDA has a kernel for it and for its gradient.
    """
    batch, length, heads, head_dim = x.shape
    if device.ON_CPU:
        tables = rotation(offset, length, head_dim, theta)
        return rotate_on_cpu(x, *(table.astype(x.dtype) for table in tables))
    if training and has_kernels(x):
        return rotate_on_cuda(x, offset, theta)
    if length > 1:  # one for each row: MLX then takes x as it lies
        offset = mx.tile(mx.arange(offset, offset + length), batch)
    options = {"traditional": True, "base": theta, "scale": 1.0, "offset": offset}
    return mx.fast.rope(x.reshape(-1, heads, 1, head_dim), head_dim, **options).reshape(x.shape)


# -------------------------------------------------------------------------------------------------
# The network


@dataclass
class ModelArgs:
    """The shape of a model, as `params.json` gives it. Raises ValueError where it is none."""

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    vocab_size: int
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, limit = getattr(self, field.name), 1000 if field.name == "n_layers" else 2**31
            kinds = int if field.type is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < limit:
                raise ValueError(f"{field.name} is {value!r}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is no multiple of n_kv_heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd")


class QuantizedLinear(nn.QuantizedLinear):
    """MLX's quantized layer, with a faster way to multiply many rows where MLX's own is slow.

    On a CPU and with CUDA the weights are then dequantized for each product. They are not kept for
    the backward pass, but dequantized again.
    """

    def __call__(self, x: mx.array) -> mx.array:
        settings = {"group_size": self.group_size, "bits": self.bits}
        weights = self.weight, self.scales, self.biases
        if x.size // x.shape[-1] <= FEW_ROWS:
            return super().__call__(x)

        @mx.custom_function
        def product(x: mx.array) -> mx.array:
            return x @ mx.dequantize(*weights, **settings).T

        @product.vjp
        def product_vjp(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
            return cotangent @ mx.dequantize(*weights, **settings)

        return product(x)


class Linear(nn.Linear):
    """`nn.Linear` without a bias; `nn.quantize` makes it a `QuantizedLinear` of this file."""

    def __init__(self, input_dims: int, output_dims: int):
        super().__init__(input_dims, output_dims, bias=False)

    def to_quantized(self, group_size: int, bits: int, **_) -> QuantizedLinear:
        return QuantizedLinear.from_linear(self, group_size, bits)


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update: `linear(x) + 2 (x A) B`.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. Around an
    `nn.QuantizedLinear` it is QLoRA (Dettmers et al., 2023).
    """

    @staticmethod
    def from_linear(linear: nn.Linear | nn.QuantizedLinear, rank: int = 8) -> "LoRALinear":
        """Wrap `linear`; with `lora_b` at zero the result computes what `linear` does."""
        output_dims, input_dims = linear.weight.shape
        if isinstance(linear, nn.QuantizedLinear):
            input_dims = linear.scales.shape[1] * linear.group_size
        lora = LoRALinear(input_dims, output_dims, rank)
        lora.linear = linear
        return lora

    def __init__(self, input_dims: int, output_dims: int, rank: int = 8):
        super().__init__()
        self.linear = Linear(input_dims, output_dims)
        bound = 1 / math.sqrt(input_dims)
        self.lora_a = mx.random.uniform(-bound, bound, (input_dims, rank))
        self.lora_b = mx.zeros((rank, output_dims))

    def __call__(self, x: mx.array) -> mx.array:
        """(..., input_dims) to (..., output_dims), in the dtype that the wrapped layer gives."""
        y = self.linear(x)
        # The float32 matrices are cast: as they are, they would make everything after it float32.
        a, b = self.lora_a.astype(y.dtype), self.lora_b.astype(y.dtype)
        return mx.addmm(y, x @ a, b * LORA_SCALE)


class RMSNorm(nn.Module):
    """Divide by the root mean square, then scale (Zhang and Sennrich, 2019)."""

    def __init__(self, dims: int, eps: float = 1e-5):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self.eps)

    def with_residual(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x, and x normalised. In training, CUDA makes the sum of both gradients at once, and none
        of the weight.
        """
        if not (self.training and x.dtype == self.weight.dtype and has_kernels(x)):
            return x, self(x)

        @mx.custom_function
        def both(x: mx.array) -> tuple[mx.array, mx.array]:
            return x, self(x)

        @both.vjp
        def both_vjp(
            x: mx.array, cotangents: tuple[mx.array, mx.array], _: tuple[mx.array, mx.array]
        ) -> mx.array:
            inputs, dim = [x, self.weight, *cotangents], x.shape[-1]
            n_threads = x.size // dim * 32
            epsilon = np.float32(self.eps).view(np.int32).item()  # MLX passes no float on
            return run_kernel("rms_norm_gradient", n_threads, inputs, 1, dim, epsilon)[0]

        return both(x)


class Attention(nn.Module):
    """Causal attention over grouped heads (Ainslie et al., "GQA", 2023) with rotary positions.

    RoPE (Su et al., 2021) turns neighbouring pairs of channels, the "traditional" kind, which is
    how Meta's checkpoints store the rows of wq and wk.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_heads = args.n_heads
        self.n_kv_heads = args.n_kv_heads
        self.head_dim = args.head_dim
        self.scale = args.head_dim**-0.5
        self.rope_theta = args.rope_theta
        self.wq = Linear(args.dim, args.n_heads * args.head_dim)
        self.wk = Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.wv = Linear(args.dim, args.n_kv_heads * args.head_dim)
        self.wo = Linear(args.n_heads * args.head_dim, args.dim)

    def __call__(self, x: mx.array, cache: LayerCache | None = None) -> tuple[mx.array, LayerCache]:
        """x: (B, L, D), the positions after those in `cache`. Gives (B, L, D) and the new cache."""
        seen = cache[2] if cache else 0
        # (B, L, heads, head_dim), then (B, heads, L, head_dim)
        queries, keys, values = (
            layer(x).reshape(*x.shape[:2], -1, self.head_dim)
            for layer in (self.wq, self.wk, self.wv)
        )
        queries, keys = (
            rotate(heads, seen, self.rope_theta, self.training) for heads in (queries, keys)
        )
        queries, keys, values = (heads.swapaxes(1, 2) for heads in (queries, keys, values))

        cache = extend_cache(cache, keys, values)
        keys, values, filled = cache
        out = attend(queries, keys[:, :, :filled], values[:, :, :filled], self.scale)
        return self.wo(out.transpose(0, 2, 1, 3).flatten(-2)), cache


def with_room(array: mx.array, seen: int, needed: int) -> mx.array:
    """The first `seen` positions of a cache's array, and blank ones up to the multiple of
    `CACHE_STEP` that holds `needed`.
    """
    batch, n_kv_heads, _, head_dim = array.shape
    room = -(-needed // CACHE_STEP) * CACHE_STEP - seen
    blank = mx.zeros((batch, n_kv_heads, room, head_dim), array.dtype)
    return mx.concatenate([array[:, :, :seen], blank], axis=2)


def extend_cache(cache: LayerCache | None, keys: mx.array, values: mx.array) -> LayerCache:
    """Append the keys and values (B, K, L, head_dim) of new positions to a layer's cache.

    Room is added `CACHE_STEP` positions at a time.
    """
    if cache is None:
        return keys, values, keys.shape[2]
    old_keys, old_values, seen = cache
    filled = seen + keys.shape[2]
    if filled > old_keys.shape[2]:
        old_keys, old_values = (with_room(array, seen, filled) for array in (old_keys, old_values))
    old_keys, old_values = old_keys[...], old_values[...]  # new arrays: the caller's stay as is
    old_keys[:, :, seen:filled] = keys
    old_values[:, :, seen:filled] = values
    return old_keys, old_values, filled


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, "GLU Variants Improve Transformer", 2020): `w2(silu(w1 x) * w3 x)`."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = Linear(args.dim, args.hidden_dim)
        self.w2 = Linear(args.hidden_dim, args.dim)
        self.w3 = Linear(args.dim, args.hidden_dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class TransformerBlock(nn.Module):
    """Attention, then the feed-forward network, each normalised before and added to its input."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def __call__(self, x: mx.array, cache: LayerCache | None = None) -> tuple[mx.array, LayerCache]:
        x, normed = self.attention_norm.with_residual(x)
        attended, cache = self.attention(normed, cache)
        x, normed = self.ffn_norm.with_residual(x + attended)
        return x + self.feed_forward(normed), cache


class Model(nn.Module):
    """The decoder, from token ids to logits (Touvron et al., "LLaMA", 2023)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.grad_checkpoint = False  # recompute each layer in the backward pass, to save memory
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = [TransformerBlock(args) for _ in range(args.n_layers)]
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, args.vocab_size)

    def __call__(
        self, inputs: mx.array, cache: list[LayerCache] | None = None
    ) -> tuple[mx.array, list[LayerCache]]:
        """Logits of the token after each position, and the cache to go on with.

        inputs: (B, L) integer token ids, the positions after those in `cache`.
        Gives logits (B, L, V) in the dtype of the weights, and one cache entry a layer.
        """
        x = self.tok_embeddings(inputs)  # (B, L, D)
        cache = cache or [None] * len(self.layers)
        new_cache = []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            run = nn.utils.checkpoint(layer) if self.grad_checkpoint else layer
            x, layer_cache = run(x, layer_cache)
            new_cache.append(layer_cache)
        return self.output(self.norm(x)), new_cache


# -------------------------------------------------------------------------------------------------
# Generating: the network once more, for one token at a time. With so little to multiply, memory is
# the limit, and beside a GPU the time that the processor takes to hand out the operations.

# On a CPU, MLX's own product with quantized weights keeps one core busy and no more.
CORES = [mx.new_stream(mx.cpu) for _ in device.available_cores()[:4]] if device.ON_CPU else []
WORTH_SHARING = 2**18  # bytes of weights; for fewer, to meet again costs more than cores save


def multiply_quantized(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """A vector (1, 1, K) times the transpose of N quantized rows: (1, 1, N)."""
    multiply = partial(mx.quantized_matmul, x, group_size=group_size, bits=bits)
    n_rows = len(weight)
    if CORES and weight.nbytes >= WORTH_SHARING:
        share, parts = -(-n_rows // len(CORES)), []
        for core, start in zip(CORES, range(0, n_rows, share), strict=False):
            rows = slice(start, start + share)
            with mx.stream(core):
                parts.append(multiply(weight[rows], scales[rows], biases[rows]))
        return mx.concatenate(parts, axis=-1)
    return multiply(weight, scales, biases)


def without_lora(layer: nn.Module) -> nn.Module:
    """The linear layer itself."""
    return layer.linear if isinstance(layer, LoRALinear) else layer


def join_lora(layers: tuple[nn.Module, ...], ends: list[int]) -> list[mx.array]:
    """The LoRA pairs of layers with the same input as one pair: (D, sum of ranks), and block by
    block (sum of ranks, all outputs). `ends` is where each layer's outputs end. Nothing where no
    layer is adapted.
    """
    pairs = []
    for layer, start, end in zip(layers, [0, *ends], ends, strict=False):
        if isinstance(layer, LoRALinear):
            others = (0, 0), (start, ends[-1] - end)  # whose outputs it leaves as they are
            pairs.append((layer.lora_a, mx.pad(layer.lora_b, others)))
    if not pairs:
        return []
    inputs, outputs = zip(*pairs, strict=True)
    return [mx.concatenate(inputs, axis=1), mx.concatenate(outputs)]


class VectorProduct:
    """Linear layers applied to one vector, outputs concatenated: (1, 1, D) to (1, 1, all outputs).

    For a GPU their weights become parts of one matrix, so that they take no memory twice. LoRA
    matrices are joined into one pair, in the dtype of the weights.
    """

    def __init__(self, *layers: nn.Module):
        linears = [without_lora(layer) for layer in layers]
        ends = np.cumsum([len(linear.weight) for linear in linears]).tolist()
        names = list(linears[0].parameters())  # the weights, quantized with scales and biases
        self.weights = [[linear[name] for name in names] for linear in linears]
        if (
            len(linears) > 1 and not device.ON_CPU
        ):  # there a product more costs less than to copy weights
            joined = [mx.concatenate(arrays) for arrays in zip(*self.weights, strict=True)]
            for name, whole in zip(names, joined, strict=True):
                for linear, part in zip(linears, mx.split(whole, ends[:-1]), strict=True):
                    linear[name] = part
            self.weights = [joined]
            mx.eval(joined)
            mx.clear_cache()  # of what the joined weights have replaced
        self.multiply = lambda x, weight: x @ weight.T
        if isinstance(linears[0], nn.QuantizedLinear):
            settings = {"group_size": linears[0].group_size, "bits": linears[0].bits}
            self.multiply = partial(multiply_quantized, **settings)
        dtype = self.weights[0][-1].dtype
        self.lora = [matrix.astype(dtype) for matrix in join_lora(layers, ends)]
        mx.eval(self.lora)

    def __call__(self, x: mx.array) -> mx.array:
        products = [self.multiply(x, *weights) for weights in self.weights]
        y = mx.concatenate(products, axis=-1)
        if self.lora:
            inputs, outputs = self.lora
            y = mx.addmm(y, x @ inputs, outputs, alpha=LORA_SCALE)
        return y


class Decoder:
    """Decodes one text token by token, from the positions in `cache` on.

    The cache's arrays are written in place, so that nobody else should hold them. With CUDA, what
    one decoder gave should be evaluated before another is called (see `fused_layers`).
    """

    def __init__(self, model: Model, cache: list[LayerCache] | None = None):
        args, dtype = model.args, model.norm.weight.dtype
        blank = mx.zeros((1, args.n_kv_heads, 0, args.head_dim), dtype)
        cache = cache or [(blank, blank, 0)] * args.n_layers
        self.cache = [[mx.contiguous(keys), mx.contiguous(values)] for keys, values, _ in cache]
        self.seen = cache[0][2]
        self.last = self.cache  # what has to be there before the cache grows
        self.embed, self.norm = model.tok_embeddings, model.norm
        self.output = VectorProduct(model.output)
        self.run_layers = fused_layers(model) or separate_layers(model)

    def __call__(self, token: mx.array) -> mx.array:
        """The logits (1, V) of the token after `token`, (1, 1) integer."""
        if self.seen == self.cache[0][0].shape[2]:
            mx.eval(self.last)  # and with it all that writes in place what is copied here
            for arrays in self.cache:
                arrays[:] = [with_room(array, self.seen, self.seen + 1) for array in arrays]
        self.last = self.run_layers(self.embed(token), self.seen, self.cache)  # (1, 1, D)
        self.seen += 1
        return self.output(self.norm(self.last))[:, -1]


def separate_layers(model: Model) -> Callable:
    """A function that gives what the layers make of x (1, 1, D), which comes after `seen`
    positions, and that puts its keys and values into a cache with room for them.
    """
    # What comes before each layer's attention and what after it. A GPU has each compiled.
    pieces = [
        (device.compiled(before_attention(layer)), device.compiled(after_attention(layer)))
        for layer in model.layers
    ]

    def run(x: mx.array, seen: int, cache: list[list[mx.array]]) -> mx.array:
        position = seen if device.ON_CPU else mx.array(seen)  # or each would be compiled anew
        new = slice(None), slice(None), slice(seen, seen + 1)
        filled = slice(None), slice(None), slice(0, seen + 1)
        for layer, (before, after), (keys, values) in zip(model.layers, pieces, cache, strict=True):
            queries, keys[new], values[new] = before(x, position)
            attended = attend(queries, keys[filled], values[filled], layer.attention.scale)
            x = after(x, attended)
        return x

    return run


def before_attention(layer: TransformerBlock) -> Callable:
    """A function that gives queries (1, H, 1, head_dim), keys and values (1, K, 1, head_dim) of
    x (1, 1, D), which is at `position`.
    """
    attention = layer.attention
    n_heads, n_kv_heads = attention.n_heads, attention.n_kv_heads
    wqkv = VectorProduct(attention.wq, attention.wk, attention.wv)

    def before(x: mx.array, position: int | mx.array) -> tuple[mx.array, mx.array, mx.array]:
        heads = wqkv(layer.attention_norm(x)).reshape(1, 1, -1, attention.head_dim)
        turned, values = mx.split(heads, [n_heads + n_kv_heads], axis=2)
        queries, keys = mx.split(rotate(turned, position, attention.rope_theta), [n_heads], axis=2)
        return tuple(heads.swapaxes(1, 2) for heads in (queries, keys, values))

    return before


def after_attention(layer: TransformerBlock) -> Callable:
    """A function that gives what the layer makes of x (1, 1, D) and of what its attention gave,
    (1, H, 1, head_dim).
    """
    feed_forward = layer.feed_forward
    wo, w2 = VectorProduct(layer.attention.wo), VectorProduct(feed_forward.w2)
    w13 = VectorProduct(feed_forward.w1, feed_forward.w3)

    def after(x: mx.array, attended: mx.array) -> mx.array:
        x = x + wo(attended.reshape(1, 1, -1))
        gate, up = mx.split(w13(layer.ffn_norm(x)), 2, axis=-1)
        return x + w2(
            swiglu(gate, up) if device.ON_CPU else nn.silu(gate) * up
        )  # one kernel, compiled

    return after


# -------------------------------------------------------------------------------------------------
# Training with CUDA: what MLX would compute in several passes over memory, a kernel does in one.

NUMBER = {mx.float16: "Float16", mx.bfloat16: "Bfloat16", mx.float32: "float"}
NUMBERS = """
struct Float16 {
    unsigned short bits;
    __device__ Float16() {}
    __device__ Float16(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
    __device__ operator float() const {
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
        return x;
    }
};

struct Bfloat16 {
    unsigned short bits;
    __device__ Bfloat16() {}
    __device__ Bfloat16(float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
    __device__ operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};
"""

TRAINING_KERNELS = """
struct alignas(8 * sizeof(Number)) Eight { Number values[8]; };

// The gradients of silu(gate) * up.
extern "C" __global__ void swiglu_gradients(
    const Eight* gates, const Eight* ups, const Eight* cotangents,
    Eight* of_gates, Eight* of_ups, unsigned n_threads
) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n_threads) return;
    Eight gate = gates[at], up = ups[at], cotangent = cotangents[at], of_gate, of_up;
    for (int i = 0; i < 8; i++) {
        float x = gate.values[i], weight = cotangent.values[i], sigmoid = 1 / (1 + __expf(-x));
        float slope = sigmoid + x * sigmoid * (1 - sigmoid);
        of_gate.values[i] = Number(weight * float(up.values[i]) * slope);
        of_up.values[i] = Number(weight * x * sigmoid);
    }
    of_gates[at] = of_gate;
    of_ups[at] = of_up;
}

// The gradient of RMSNorm's input, plus `passed`, that of the residual. Each warp takes a row.
extern "C" __global__ void rms_norm_gradient(
    const Eight* inputs, const Eight* weights, const Eight* passed, const Eight* cotangents,
    Eight* gradients, unsigned n_threads, int dim, int bits_of_epsilon
) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n_threads) return;
    unsigned lane = at % 32, size = dim / 8, row = at / 32 * size;
    float squares = 0, products = 0;
    for (unsigned k = lane; k < size; k += 32) {
        Eight input = inputs[row + k], weight = weights[k], cotangent = cotangents[row + k];
        for (int i = 0; i < 8; i++) {
            float x = input.values[i];
            squares += x * x;
            products += x * float(weight.values[i]) * float(cotangent.values[i]);
        }
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        squares += __shfl_xor_sync(~0u, squares, distance);
        products += __shfl_xor_sync(~0u, products, distance);
    }
    float scale = rsqrtf(squares / dim + __int_as_float(bits_of_epsilon));
    float pull = products / dim * scale * scale * scale;
    for (unsigned k = lane; k < size; k += 32) {
        Eight input = inputs[row + k], weight = weights[k], cotangent = cotangents[row + k];
        Eight gradient = passed[row + k];
        for (int i = 0; i < 8; i++) {
            float through = float(weight.values[i]) * float(cotangent.values[i]) * scale;
            through -= float(input.values[i]) * pull;
            gradient.values[i] = Number(float(gradient.values[i]) + through);
        }
        gradients[row + k] = gradient;
    }
}

// Pairs of channels of (rows, length, heads, head_dim), turned by the angles of their positions.
extern "C" __global__ void rotate(
    const Eight* inputs, const float* frequencies, Eight* outputs,
    unsigned n_threads, int length, int heads, int head_dim, int offset, int direction
) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x, per_head = head_dim / 8;
    if (at >= n_threads) return;
    Eight channels = inputs[at];
    int position = at / per_head / heads % length + offset;
    for (int i = 0; i < 8; i += 2) {
        float sine, cosine, a = channels.values[i], b = channels.values[i + 1];
        sincosf(position * frequencies[at % per_head * 4 + i / 2], &sine, &cosine);
        sine *= direction;
        channels.values[i] = Number(a * cosine - b * sine);
        channels.values[i + 1] = Number(b * cosine + a * sine);
    }
    outputs[at] = channels;
}
"""


def load_library(*names: str) -> ctypes.CDLL | None:
    """The first of these shared libraries that there is."""
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@lru_cache
def compile_cuda(source: str, constants: tuple[tuple[str, object], ...]) -> bytes | None:
    """The code of CUDA kernels for this GPU, made by NVIDIA's run-time compiler, which MLX brings.

    MLX's own way, `mx.fast.cuda_kernel`, takes two seconds in each process, most of it for headers.
    Gives None where there is no compiler, or where it refuses.
    """
    compiler = load_library("libnvrtc.so.13", "libnvrtc.so.12")
    if not compiler:
        return None
    options = [f"--gpu-architecture={mx.device_info()['architecture']}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in constants]
    values = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    compiler.nvrtcCreateProgram(ctypes.byref(program), source.encode(), None, 0, None, None)
    if compiler.nvrtcCompileProgram(program, len(options), values):
        return None
    compiler.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    compiler.nvrtcGetCUBIN(program, code)
    compiler.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def has_kernels(x: mx.array) -> bool:
    """Whether TRAINING_KERNELS serve for arrays like this one."""
    if not device.has_cuda() or x.shape[-1] % 8 or x.size // 8 >= 2**31:
        return False
    return training_kernels(x.dtype) is not None


def training_kernels(dtype: mx.Dtype) -> bytes | None:
    return compile_cuda(NUMBERS + TRAINING_KERNELS, (("Number", NUMBER[dtype]),))


def run_kernel(
    name: str, n_threads: int, inputs: list[mx.array], n_outputs: int, *scalars: int
) -> list[mx.array]:
    """What one of TRAINING_KERNELS makes of arrays, in the shape and dtype of the first."""
    first = inputs[0]
    return mx.fast.precompiled_cuda_kernel(
        name=name,
        compiled_source=training_kernels(first.dtype),
        inputs=inputs,
        output_shapes=[first.shape] * n_outputs,
        output_dtypes=[first.dtype] * n_outputs,
        scalars=[n_threads, *scalars],
        grid=(n_threads, 1, 1),
        threadgroup=(256, 1, 1),
        ensure_row_contiguous=True,
    )


# -------------------------------------------------------------------------------------------------
# Generating with CUDA: a layer for one token in one kernel. With a kernel for each operation, the
# GPU rests while one ends and the next begins, and the processor has ten times as many to hand out.
# Each block of threads fills a multiprocessor, and all wait for each other between two products.

DECODER_LAYER = """
constexpr int Q = N_HEADS * HEAD_DIM, KV = N_KV_HEADS * HEAD_DIM, QKV = Q + 2 * KV;
constexpr int LANES = 32, WARPS = THREADS / LANES;
constexpr int VECTOR = 16 / sizeof(Number);        // numbers in 16 bytes
constexpr int CHUNK = BITS ? 128 / BITS : VECTOR;  // weights in 16 bytes
constexpr int POSITIONS = 4;                       // that a warp attends to at once
constexpr int CHANNELS = HEAD_DIM / LANES;         // of a head, that a thread takes
constexpr int PART = HEAD_DIM + 4;                 // sums, highest score and total of weights
constexpr float LOG2_E = 1.44269504f;

constexpr int MULTIPLE = BITS ? GROUP_SIZE : VECTOR;
constexpr int LARGEST = HIDDEN > DIM && HIDDEN > Q ? HIDDEN : DIM > Q ? DIM : Q;
constexpr int ROUNDS = (LARGEST + LANES * CHUNK - 1) / (LANES * CHUNK);
constexpr int TOTALS = ROUNDS * LANES * CHUNK * sizeof(Number) / sizeof(float);  // where they lie

static_assert(BITS == 0 || BITS == 4 || BITS == 8, "weights of other sizes are not read");
static_assert(DIM % MULTIPLE + Q % MULTIPLE + HIDDEN % MULTIPLE == 0, "no row ends amid 16 bytes");
static_assert(HEAD_DIM % (2 * LANES) == 0, "each thread takes pairs of channels");
static_assert((TOTALS + LARGEST / CHUNK) * 4 <= SHARED_MEMORY, "what is multiplied has room");

struct alignas(16) Vector { Number values[VECTOR]; };
struct alignas(CHANNELS * sizeof(Number)) Channels { Number values[CHANNELS]; };
struct Matrix { const void* weight; const Number *scales, *biases; };

using Count = unsigned long long;

extern __shared__ Vector shared[];  // what matrices are multiplied by, and after it its totals

__device__ float sum_of_warp(float x) {
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// All blocks wait here for each other.
__device__ void meet(Count* arrived) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        Count now, target = (atomicAdd(arrived, Count(1)) / gridDim.x + 1) * gridDim.x;
        do {
            asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(now) : "l"(arrived) : "memory");
        } while (now < target);
    }
    __syncthreads();
}

// The numbers from k on of what lies in shared memory: in such an order that lanes, each at a chunk
// of weights of its own, read what belongs to it from 32 places side by side.
__device__ Vector& input(int k) {
    int round = k / (LANES * CHUNK), lane = k / CHUNK % LANES, part = k % CHUNK / VECTOR;
    return shared[(round * (CHUNK / VECTOR) + part) * LANES + lane];
}

// The total of the numbers that a chunk of weights is multiplied by.
__device__ float& total(int chunk) { return reinterpret_cast<float*>(shared)[TOTALS + chunk]; }

// Waits for the K numbers of the input. Quantized weights need their totals.
template <int K> __device__ void add_up() {
    __syncthreads();
    if (BITS == 0) return;
    for (int chunk = threadIdx.x; chunk < K / CHUNK; chunk += THREADS) {
        float sum = 0;
        for (int i = 0; i < CHUNK; i += VECTOR) {
            Vector some = input(chunk * CHUNK + i);
            for (float value : some.values) sum += value;
        }
        total(chunk) = sum;
    }
    __syncthreads();
}

// RMSNorm, into the input.
__device__ void normalize(const Number* in, const Number* weight) {
    constexpr int N = (DIM / VECTOR + THREADS - 1) / THREADS;
    __shared__ float sums[WARPS];
    Vector inputs[N], weights[N];
    float sum = 0;
    for (int n = 0; n < N; n++) {
        int k = (n * THREADS + threadIdx.x) * VECTOR;
        if (k >= DIM) break;
        uint4 words = __ldcg(reinterpret_cast<const uint4*>(in + k));
        inputs[n] = reinterpret_cast<Vector&>(words);
        weights[n] = reinterpret_cast<const Vector&>(weight[k]);
        for (float value : inputs[n].values) sum += value * value;
    }
    sum = sum_of_warp(sum);
    if (threadIdx.x % LANES == 0) sums[threadIdx.x / LANES] = sum;
    __syncthreads();
    sum = 0;
    for (float part : sums) sum += part;
    float factor = rsqrtf(sum / DIM + float(EPSILON));
    for (int n = 0; n < N; n++) {
        int k = (n * THREADS + threadIdx.x) * VECTOR;
        if (k >= DIM) break;
        for (int i = 0; i < VECTOR; i++) {
            float value = float(inputs[n].values[i]) * factor;
            inputs[n].values[i] = Number(value * float(weights[n].values[i]));
        }
        input(k) = inputs[n];
    }
}

// The product of the input with a row of a matrix, of which the lanes of a warp take 16 bytes each
// at a time.
template <int K> __device__ float dot(const Number* row) {
    float sum = 0;
    #pragma unroll 8
    for (int k = threadIdx.x % LANES * VECTOR; k < K; k += LANES * VECTOR) {
        uint4 words = __ldcs(reinterpret_cast<const uint4*>(row + k));
        Vector weights = reinterpret_cast<Vector&>(words);
        Vector inputs = input(k);
        for (int i = 0; i < VECTOR; i++) sum += float(inputs.values[i]) * float(weights.values[i]);
    }
    return sum_of_warp(sum);
}

template <int K> __device__ __noinline__ float dot(Matrix matrix, int row) {
    if (BITS == 0) return dot<K>(static_cast<const Number*>(matrix.weight) + size_t(row) * K);
    const uint4* chunks = static_cast<const uint4*>(matrix.weight) + size_t(row) * (K / CHUNK);
    const Number* scales = matrix.scales + size_t(row) * (K / GROUP_SIZE);
    const Number* biases = matrix.biases + size_t(row) * (K / GROUP_SIZE);
    float sum = 0;
    #pragma unroll 4
    for (int chunk = threadIdx.x % LANES; chunk < K / CHUNK; chunk += LANES) {
        uint4 four = __ldcs(chunks + chunk);
        float scale = scales[chunk * CHUNK / GROUP_SIZE], bias = biases[chunk * CHUNK / GROUP_SIZE];
        unsigned words[4] = {four.x, four.y, four.z, four.w};
        float product = 0;
        for (int j = 0; j < CHUNK; j += VECTOR) {
            Vector inputs = input(chunk * CHUNK + j);
            for (int i = 0; i < VECTOR; i++) {  // 1 + integer / 2**BITS: no slow conversion
                constexpr int SHIFT = 23 - BITS;
                int start = (j + i) * BITS % 32;
                unsigned word = words[(j + i) * BITS / 32];
                word = start < SHIFT ? word << (SHIFT - start) : word >> (start - SHIFT);
                word = 0x3f800000 | (word & ((1 << BITS) - 1) << SHIFT);
                product += float(inputs.values[i]) * __uint_as_float(word);
            }
        }
        sum += scale * (product - total(chunk)) * (1 << BITS) + bias * total(chunk);
    }
    return sum_of_warp(sum);
}

// One query head's part `split` of all positions, as in "Flash-Decoding" (Dao et al., 2023): sums
// of weighted values (HEAD_DIM), the highest score and the total of weights. `heads` (QKV + ranks)
// are queries, keys and values at `position`, before LoRA and rotation, and the products with
// LoRA's first matrices. The last part has that position, and adds it to the cache.
__device__ void attend(
    int head, int split, int splits, const float* heads, const Number* lora_b, int ranks,
    Number* keys, Number* values, const float* frequencies, int position, int capacity, float* part
) {
    constexpr int SHARING = N_HEADS / N_KV_HEADS;
    __shared__ float all_sums[WARPS][HEAD_DIM], all_highest[WARPS], all_totals[WARPS];
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, kv_head = head / SHARING;
    size_t cached = size_t(kv_head) * capacity * HEAD_DIM + lane * CHANNELS;

    auto load = [&](int at, float* channels) {
        at += lane * CHANNELS;
        for (int i = 0; i < CHANNELS; i++) channels[i] = __ldcg(heads + at + i);
        for (int r = 0; r < ranks; r++) {
            float inner = __ldcg(heads + QKV + r);
            const Number* outer = lora_b + size_t(r) * QKV + at;
            for (int i = 0; i < CHANNELS; i++) channels[i] += inner * float(outer[i]);
        }
    };
    auto rotate = [&](float* channels, float scale) {
        for (int i = 0; i < CHANNELS; i += 2) {
            float sine, cosine, a = channels[i], b = channels[i + 1];
            sincosf(position * frequencies[(lane * CHANNELS + i) / 2], &sine, &cosine);
            channels[i] = (a * cosine - b * sine) * scale;
            channels[i + 1] = (b * cosine + a * sine) * scale;
        }
    };
    auto score = [](const float* query, Channels key) {
        float sum = 0;
        for (int i = 0; i < CHANNELS; i++) sum += query[i] * float(key.values[i]);
        return sum_of_warp(sum);
    };

    float query[CHANNELS], sums[CHANNELS] = {}, highest = -1e30f, weights = 0;
    load(head * HEAD_DIM, query);
    rotate(query, rsqrtf(HEAD_DIM) * LOG2_E);
    if (warp == 0 && split == splits - 1) {
        float key[CHANNELS];
        Channels new_key, new_value;
        load(Q + kv_head * HEAD_DIM, key);
        load(Q + KV + kv_head * HEAD_DIM, sums);
        rotate(key, 1);
        for (int i = 0; i < CHANNELS; i++) {
            new_key.values[i] = Number(key[i]);
            new_value.values[i] = Number(sums[i]);
        }
        if (head % SHARING == 0) {
            size_t at = cached + size_t(position) * HEAD_DIM;
            reinterpret_cast<Channels&>(keys[at]) = new_key;
            reinterpret_cast<Channels&>(values[at]) = new_value;
        }
        highest = score(query, new_key);
        weights = 1;
    }
    int share = (position + splits - 1) / splits, end = min((split + 1) * share, position);
    for (int p = split * share + warp * POSITIONS; p < end; p += WARPS * POSITIONS) {
        Channels some_keys[POSITIONS], some_values[POSITIONS];
        for (int j = 0; j < POSITIONS; j++) {
            size_t at = cached + size_t(min(p + j, end - 1)) * HEAD_DIM;
            some_keys[j] = reinterpret_cast<const Channels&>(keys[at]);
            some_values[j] = reinterpret_cast<const Channels&>(values[at]);
        }
        float scores[POSITIONS], before = highest;
        for (int j = 0; j < POSITIONS; j++) {
            scores[j] = score(query, some_keys[j]);
            highest = max(highest, scores[j]);
        }
        float shrink = exp2f(before - highest);
        weights *= shrink;
        for (int i = 0; i < CHANNELS; i++) sums[i] *= shrink;
        for (int j = 0; j < POSITIONS && p + j < end; j++) {
            float weight = exp2f(scores[j] - highest);
            weights += weight;
            for (int i = 0; i < CHANNELS; i++) {
                sums[i] += weight * float(some_values[j].values[i]);
            }
        }
    }
    // What the warps have is joined.
    for (int i = 0; i < CHANNELS; i++) all_sums[warp][lane * CHANNELS + i] = sums[i];
    all_highest[warp] = highest;
    all_totals[warp] = weights;
    __syncthreads();
    for (float other : all_highest) highest = max(highest, other);
    for (int k = threadIdx.x; k < HEAD_DIM; k += THREADS) {
        float sum = 0;
        weights = 0;
        for (int w = 0; w < WARPS; w++) {
            float weight = exp2f(all_highest[w] - highest);
            sum += weight * all_sums[w][k];
            weights += weight * all_totals[w];
        }
        part[k] = sum;
        part[HEAD_DIM] = highest;
        part[HEAD_DIM + 1] = weights;
    }
    __syncthreads();
}

// The output of attention, into the input, from the parts that `attend` gave for each head.
__device__ void join_parts(const float* parts, int splits) {
    for (int k = threadIdx.x * VECTOR; k < Q; k += THREADS * VECTOR) {
        const float* part = parts + k / HEAD_DIM * splits * PART;
        float sums[VECTOR] = {}, highest = -1e30f, weights = 0;
        #pragma unroll 4
        for (int s = 0; s < splits; s++, part += PART) {
            float2 end = __ldcg(reinterpret_cast<const float2*>(part + HEAD_DIM));
            float before = highest;
            highest = max(highest, end.x);
            float shrink = exp2f(before - highest), weight = exp2f(end.x - highest);
            weights = weights * shrink + end.y * weight;
            for (int i = 0; i < VECTOR; i += 4) {
                float4 some = __ldcg(reinterpret_cast<const float4*>(part + k % HEAD_DIM + i));
                float values[4] = {some.x, some.y, some.z, some.w};
                for (int j = 0; j < 4; j++) {
                    sums[i + j] = sums[i + j] * shrink + values[j] * weight;
                }
            }
        }
        Vector joined;
        for (int i = 0; i < VECTOR; i++) joined.values[i] = Number(sums[i] / weights);
        input(k) = joined;
    }
}

extern "C" __global__ __launch_bounds__(THREADS, 1) void decoder_layer(
    const Number* in, const int* position, const Number* attention_norm, const Number* ffn_norm,
    const void* wq, const Number* wq_scales, const Number* wq_biases,
    const void* wk, const Number* wk_scales, const Number* wk_biases,
    const void* wv, const Number* wv_scales, const Number* wv_biases,
    const void* wo, const Number* wo_scales, const Number* wo_biases,
    const void* w1, const Number* w1_scales, const Number* w1_biases,
    const void* w2, const Number* w2_scales, const Number* w2_biases,
    const void* w3, const Number* w3_scales, const Number* w3_biases,
    const Number* lora_a, const Number* lora_b, Number* keys, Number* values,
    const float* frequencies, Count* arrived, const Number* before,
    Number* out, float* heads, float* parts, Number* middle, Number* hidden,
    int ranks, int capacity
) {
    // `before`, of the last token, is only waited for. Warp by warp, the blocks take turns with the
    // rows of a matrix.
    int lane = threadIdx.x % LANES, block = blockIdx.x, blocks = gridDim.x, seen = *position;
    int first = threadIdx.x / LANES * blocks + block, step = WARPS * blocks;

    normalize(in, attention_norm);
    add_up<DIM>();
    for (int row = first; row < QKV + ranks; row += step) {
        float product;
        if (row < QKV) {
            bool of_query = row < Q, of_key = !of_query && row < Q + KV;
            Matrix matrix = of_query ? Matrix{wq, wq_scales, wq_biases}
                          : of_key   ? Matrix{wk, wk_scales, wk_biases}
                                     : Matrix{wv, wv_scales, wv_biases};
            int start = of_query ? 0 : of_key ? Q : Q + KV;
            product = dot<DIM>(matrix, row - start);
        } else {
            product = dot<DIM>(lora_a + size_t(row - QKV) * DIM);
        }
        if (lane == 0) heads[row] = product;
    }
    meet(arrived);

    int splits = min(min(max(blocks / N_HEADS, 1), MAX_SPLITS), seen / 64 + 1);
    for (int item = block; item < N_HEADS * splits; item += blocks) {
        attend(item / splits, item % splits, splits, heads, lora_b, ranks, keys, values,
               frequencies, seen, capacity, parts + item * PART);
    }
    meet(arrived);

    join_parts(parts, splits);
    add_up<Q>();
    for (int row = first; row < DIM; row += step) {
        float product = dot<Q>(Matrix{wo, wo_scales, wo_biases}, row);
        if (lane == 0) middle[row] = Number(float(in[row]) + product);
    }
    meet(arrived);

    normalize(middle, ffn_norm);
    add_up<DIM>();
    for (int row = first; row < HIDDEN; row += step) {
        float products[2];
        #pragma unroll 1
        for (int i = 0; i < 2; i++) {
            Matrix matrix = i ? Matrix{w3, w3_scales, w3_biases} : Matrix{w1, w1_scales, w1_biases};
            products[i] = dot<DIM>(matrix, row);
        }
        float silu = products[0] / (1 + __expf(-products[0]));
        if (lane == 0) hidden[row] = Number(silu * products[1]);
    }
    meet(arrived);

    for (int k = threadIdx.x * VECTOR; k < HIDDEN; k += THREADS * VECTOR) {
        reinterpret_cast<uint4&>(input(k)) = __ldcg(reinterpret_cast<const uint4*>(hidden + k));
    }
    add_up<HIDDEN>();
    for (int row = first; row < DIM; row += step) {
        float product = dot<HIDDEN>(Matrix{w2, w2_scales, w2_biases}, row);
        if (lane == 0) out[row] = Number(float(middle[row]) + product);
    }
}
"""


def cuda_attribute(number: int) -> int:
    """A property of the GPU, numbered as `CUdevice_attribute` of CUDA's driver."""
    value = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(value), number, 0)
    return value.value


def matrices(layer: TransformerBlock) -> tuple[nn.Module, ...]:
    attention, feed_forward = layer.attention, layer.feed_forward
    projections = attention.wq, attention.wk, attention.wv, attention.wo
    return *projections, feed_forward.w1, feed_forward.w2, feed_forward.w3


def kernel_constants(model: Model) -> dict[str, object] | None:
    """What the kernel's code knows of the model; None where it has matrices of several kinds, or
    LoRA after attention.
    """
    args, dtype = model.args, model.norm.weight.dtype
    linears = [without_lora(matrix) for layer in model.layers for matrix in matrices(layer)]
    kinds = {
        (getattr(m, "bits", 0), getattr(m, "group_size", 1), getattr(m, "scales", m.weight).dtype)
        for m in linears
    }
    bits, group_size, dtype_of_one = kinds.pop()
    adapted = [matrix for layer in model.layers for matrix in matrices(layer)[3:]]
    if kinds or dtype_of_one != dtype or any(isinstance(m, LoRALinear) for m in adapted):
        return None
    return {
        "Number": NUMBER[dtype],
        "BITS": bits,
        "GROUP_SIZE": group_size,
        "DIM": args.dim,
        "HIDDEN": args.hidden_dim,
        "N_HEADS": args.n_heads,
        "N_KV_HEADS": args.n_kv_heads,
        "HEAD_DIM": args.head_dim,
        "EPSILON": float(args.norm_eps),
        "THREADS": THREADS,
        "SHARED_MEMORY": SHARED_MEMORY,
        "MAX_SPLITS": MAX_SPLITS,
    }


def kernel_inputs(layer: TransformerBlock) -> tuple[list[mx.array], int]:
    """The arrays of a layer in the kernel's order, and how many ranks its LoRA matrices have."""
    norms = [layer.attention_norm.weight, layer.ffn_norm.weight]
    linears = [without_lora(matrix) for matrix in matrices(layer)]
    parts = [list(linear.parameters().values()) for linear in linears]
    # Scales and biases that there are not, nobody reads: the weights stand for them.
    weights = [array for part in parts for array in (part * 3)[:3]]
    projections = matrices(layer)[:3]
    ends = np.cumsum([len(linear.weight) for linear in linears[:3]]).tolist()
    pair = join_lora(projections, ends)
    a, b = pair or (mx.zeros((1, 1)), mx.zeros((1, 1)))
    lora = [mx.contiguous(a.T).astype(norms[0].dtype), (b * LORA_SCALE).astype(norms[0].dtype)]
    return norms + weights + lora, len(b) if pair else 0


def fused_layers(model: Model) -> Callable | None:
    """What `separate_layers` gives, with one kernel a layer; None where no kernel fits the model.

    Its code is made once in a process, in half a second to one. As the blocks of a kernel wait for
    each other, and fill the GPU, no two of them may run at once.
    """
    if not device.has_cuda():
        return None
    n_multiprocessors, shared_memory = cuda_attribute(16), cuda_attribute(97)  # of a block, at most
    has_room = shared_memory >= SHARED_MEMORY + ATTENTION_MEMORY
    constants = kernel_constants(model) if has_room else None
    code = compile_cuda(NUMBERS + DECODER_LAYER, tuple(constants.items())) if constants else None
    if not code:
        return None
    args, dtype = model.args, model.norm.weight.dtype
    layers = [kernel_inputs(layer) for layer in model.layers]
    frequencies = rotary_frequencies_on_gpu(args.head_dim, args.rope_theta)
    arrived = mx.zeros(64, mx.uint64)  # one would lie in memory that MLX shares with the processor
    mx.eval(layers, frequencies, arrived)
    n_projected = (args.n_heads + 2 * args.n_kv_heads) * args.head_dim
    n_sums = args.n_heads * MAX_SPLITS * (args.head_dim + 4)

    @mx.compile
    def run(
        x: mx.array, position: mx.array, cache: list[list[mx.array]], before: mx.array
    ) -> mx.array:
        for (arrays, ranks), (keys, values) in zip(layers, cache, strict=True):
            x, *_ = mx.fast.precompiled_cuda_kernel(
                name="decoder_layer",
                compiled_source=code,
                inputs=[x, position, *arrays, keys, values, frequencies, arrived, before],
                output_shapes=[
                    x.shape,
                    (n_projected + ranks,),
                    (n_sums,),
                    x.shape,
                    (args.hidden_dim,),
                ],
                output_dtypes=[dtype, mx.float32, mx.float32, dtype, dtype],
                scalars=[ranks, keys.shape[2]],
                grid=(n_multiprocessors * THREADS, 1, 1),
                threadgroup=(THREADS, 1, 1),
                shared_memory=SHARED_MEMORY,
            )
        return x

    before = mx.zeros((1, 1, args.dim), dtype)

    def run_layers(x: mx.array, seen: int, cache: list[list[mx.array]]) -> mx.array:
        nonlocal before  # what the last token's layers gave, so that those of this one come after
        before = run(x, mx.array(seen), cache, before)
        return before

    return run_layers
