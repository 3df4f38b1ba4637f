"""The network of Llama 1, Llama 2 and Mistral, with LoRA adapters for its linear layers.

Attributes are named as in Meta's checkpoints, so that the module's parameter paths are the keys of
`weights.npz` (`layers.0.attention.wq.weight`, ...).

Shapes in comments: B rows of a batch, L positions, S positions in the key-value cache, D = `dim`,
H = `n_heads`, K = `n_kv_heads`, V = `vocab_size`.
"""

import ctypes
import importlib.metadata
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache, partial

import numpy as np


def load_fast_blas() -> ctypes.CDLL | None:
    """Load Intel's MKL, where it is installed, in place of the BLAS that MLX's Linux wheel bundles.

    The bundled one is the reference implementation, some fifty times slower. The dynamic linker
    takes the first `cblas_sgemm` that it meets, so this has to run before MLX is first imported.
    Gives None where there is no MKL; macOS and CUDA do not need it.
    """
    try:
        files = importlib.metadata.files("mkl") or []
        library = next(f.locate() for f in files if f.name.startswith("libmkl_rt.so"))
        return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except (importlib.metadata.PackageNotFoundError, StopIteration, OSError):
        return None


def keep_freed_memory() -> None:
    """Have the C library of Linux reuse the memory of large arrays, where it would give each back
    to the system at once, and wait for the system to clear it when it is needed again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim_threshold, mmap_max, arena_max = -1, -4, -8
        for setting, value in ((trim_threshold, 2**31 - 1), (mmap_max, 0), (arena_max, 1)):
            mallopt(setting, value)


FAST_BLAS = load_fast_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

ON_CPU = mx.default_device() == mx.Device(mx.cpu)
if ON_CPU:
    # MLX then queues the work of all streams in turns, not that of one behind that of another.
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1000")
elif mx.cuda.is_available():
    # In smaller portions than MLX's own, work that waits for the GPU holds a third less memory.
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "100")
    # The graphs that each length of a batch takes are kept, not made anew for each batch.
    os.environ.setdefault("MLX_CUDA_GRAPH_CACHE_SIZE", "10000")
LORA_SCALE = 2.0
CACHE_STEP = 256  # positions by which the key-value cache grows
QUERY_BLOCK = 128  # positions whose attention a CPU computes at once
# Up to so many rows, MLX's product with quantized weights beats one with dequantized weights.
FEW_ROWS = 2 if ON_CPU else 16 if mx.cuda.is_available() else math.inf

# One layer's keys and values (B, K, capacity, head_dim), and how many positions are filled.
LayerCache = tuple[mx.array, mx.array, int]

# -------------------------------------------------------------------------------------------------
# Arithmetic. A CPU spends its time in exponentials, once products are fast: each is computed no
# more often than it must be, and in the cheapest of MLX's ways. A GPU takes MLX's fused kernels.


def available_cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count()))


def open_streams(n: int, n_sharing: int = 1) -> list[mx.Stream]:
    """Up to `n` streams that work side by side: on a CPU, where MLX runs a stream on one thread, as
    many as there are cores for each of the `n_sharing` processes that have them, which the BLAS's
    threads are shared out among; on a GPU one.
    """
    if not ON_CPU:
        return [mx.default_stream(mx.default_device())]
    keep_freed_memory()
    n_cores = len(available_cores())
    n = min(n, max(1, n_cores // n_sharing))
    if FAST_BLAS:
        FAST_BLAS.MKL_Set_Num_Threads(max(1, n_cores // (n * n_sharing)))
    return [mx.new_stream(mx.cpu) for _ in range(n)]


def exp(x: mx.array) -> mx.array:
    """e to the x. The power, as exact as `mx.exp`, takes a third of its time on a CPU."""
    return mx.power(math.e, x) if ON_CPU else mx.exp(x)


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
    # `mx.compile` would store what two of its kernels share, so each gradient, and the forward
    # pass, has an expression of its own.
    x = gate.astype(mx.float32)
    sigmoid = 1 / (1 + mx.exp(-x))
    gradient = cotangent * up * (sigmoid + x * sigmoid * (1 - sigmoid))
    return gradient.astype(gate.dtype), cotangent * nn.silu(gate)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up`."""
    return swiglu_on_cpu(gate, up)[0] if ON_CPU else swiglu_on_gpu(gate, up)


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
    at_targets = mx.arange(targets.size) * powers.shape[-1] + targets.flatten()
    gradient = gradient.at[at_targets].subtract(weights.flatten())
    return gradient.reshape(powers.shape), mx.zeros_like(targets)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Minus the log-probability, in nats and float32, of each target.

    logits: (..., V); targets: (...) integer. Gives (...). The gradient is that of softmax, minus
    one at the target.
    """
    if ON_CPU:
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
    (queries, keys, values, mask), (cotangent, *_), (out, powers, total) = (
        primals,
        cotangents,
        outputs,
    )
    cotangent = cotangent / total
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
    """Scaled dot-product attention, in which the last query sees all keys, and earlier ones less.

    queries: (B, H, L, head_dim); keys and values: (B, K, S, head_dim). Gives the queries' shape.
    """
    batch, n_heads, length, head_dim = queries.shape
    n_kv_heads, positions = keys.shape[1:3]
    if not ON_CPU:
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


@lru_cache(maxsize=2)
def rotation(offset: int, length: int, head_dim: int, theta: float) -> tuple[mx.array, mx.array]:
    """Cosines and sines (length, 1, head_dim) of the angles by which positions from `offset` on are
    turned.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.arange(offset, offset + length)[:, None, None] * frequencies.repeat(2)
    return mx.array(np.cos(angles), mx.float32), mx.array(np.sin(angles), mx.float32)


@lru_cache
def right_angle(head_dim: int, dtype: mx.Dtype) -> mx.array:
    """The matrix that makes a pair of channels (a, b) into (-b, a), its turn by a right angle."""
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


def rotate(x: mx.array, offset: int | mx.array, theta: float) -> mx.array:
    """Turn each pair of neighbouring channels by an angle that grows with the position.

    x: (B, L, heads, head_dim), the positions from `offset` on, which for one position may be an
    array. Gives the same shape.
    """
    batch, length, heads, head_dim = x.shape
    if ON_CPU:
        tables = rotation(offset, length, head_dim, theta)
        return rotate_on_cpu(x, *(table.astype(x.dtype) for table in tables))
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

    def __init__(self, input_dims: int, output_dims: int, rank: int = 8, bias: bool = False):
        super().__init__()
        self.linear = nn.Linear(input_dims, output_dims, bias=bias)
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
        queries, keys = (rotate(heads, seen, self.rope_theta) for heads in (queries, keys))
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
    old_keys, old_values = old_keys[...], old_values[...]  # names of their own: theirs stay as is
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
        attended, cache = self.attention(self.attention_norm(x), cache)
        x = x + attended
        return x + self.feed_forward(self.ffn_norm(x)), cache


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
CORES = [mx.new_stream(mx.cpu) for _ in available_cores()[:4]] if ON_CPU else []
WORTH_SHARING = 2**18  # bytes of weights; for fewer, to meet again costs more than cores save

# A vector times quantized weights, for CUDA, where MLX's own kernel reads them at a third of the
# memory's speed. x (K), weight (N, K / PER_WORD), scales and biases (N, K / GROUP_SIZE), out (N).
# N and K are no constants, so that a model takes one kernel: each process compiles its own anew.
# A warp takes two rows, for which it reads x once; a thread takes 16 bytes of each at a time, which
# lie in one group. An integer becomes a float without a conversion, as the last bits of 2**23.
QUANTIZED_PRODUCT = """
    constexpr int ROWS = 2;
    constexpr int PER_WORD = 32 / BITS;
    constexpr int CHUNK = 4 * PER_WORD;
    constexpr int VECTOR = 16 / sizeof(T);
    struct alignas(16) Vector { T values[VECTOR]; };

    int N = weight_shape[0], K = weight_shape[1] * PER_WORD;
    int first = (blockIdx.y * blockDim.y + threadIdx.y) * ROWS;
    if (first >= N) return;
    size_t rows[ROWS];
    float sums[ROWS] = {};
    for (int r = 0; r < ROWS; r++) rows[r] = min(first + r, N - 1);
    #pragma unroll 1
    for (int k = threadIdx.x * CHUNK; k < K; k += 32 * CHUNK) {
        float inputs[CHUNK];
        float total = 0;
        for (int i = 0; i < CHUNK; i += VECTOR) {
            Vector vector = *reinterpret_cast<const Vector*>(x + k + i);
            for (int j = 0; j < VECTOR; j++) {
                inputs[i + j] = static_cast<float>(vector.values[j]);
                total += inputs[i + j];
            }
        }
        for (int r = 0; r < ROWS; r++) {
            const uint32_t* at = weight + rows[r] * (K / PER_WORD) + k / PER_WORD;
            uint4 chunk = __ldcs(reinterpret_cast<const uint4*>(at));
            uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
            float product = 0;
            for (int i = 0; i < CHUNK; i++) {
                uint32_t value = words[i / PER_WORD] >> (i % PER_WORD * BITS) & ((1 << BITS) - 1);
                product += inputs[i] * (__uint_as_float(0x4B000000 | value) - 8388608.0f);
            }
            size_t group = rows[r] * (K / GROUP_SIZE) + k / GROUP_SIZE;
            sums[r] += static_cast<float>(scales[group]) * product;
            sums[r] += static_cast<float>(biases[group]) * total;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int distance = 16; distance > 0; distance /= 2) {
            sums[r] += __shfl_xor_sync(0xffffffff, sums[r], distance);
        }
        if (threadIdx.x == 0) out[rows[r]] = static_cast<T>(sums[r]);
    }
"""


@lru_cache
def quantized_product_kernel() -> Callable:
    inputs = ["x", "weight", "scales", "biases"]
    return mx.fast.cuda_kernel("quantized_product", inputs, ["out"], QUANTIZED_PRODUCT)


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
    if not mx.cuda.is_available() or bits not in (4, 8):
        return multiply(weight, scales, biases)
    template = {"T": x.dtype, "BITS": bits, "GROUP_SIZE": group_size}
    (product,) = quantized_product_kernel()(
        inputs=[x, weight, scales, biases],
        template=list(template.items()),
        grid=(32, -(-n_rows // 2), 1),
        threadgroup=(32, 4, 1),
        output_shapes=[(1, 1, n_rows)],
        output_dtypes=[x.dtype],
    )
    return product


def join_lora(layers: tuple[nn.Module, ...], ends: list[int]) -> list[mx.array]:
    """One pair of LoRA matrices for layers of which each gives the outputs up to its end in `ends`:
    (D, all ranks) and (all ranks, all outputs); nothing where no layer is adapted.
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
    """What linear layers give for the same vector, side by side: (1, 1, D) to (1, 1, all outputs).

    For a GPU their weights become parts of one matrix, so that they take no memory twice. LoRA
    matrices are joined into one pair, in the dtype of the weights.
    """

    def __init__(self, *layers: nn.Module):
        linears = [layer.linear if isinstance(layer, LoRALinear) else layer for layer in layers]
        ends = np.cumsum([len(linear.weight) for linear in linears]).tolist()
        names = list(linears[0].parameters())  # the weights, quantized with scales and biases
        self.weights = [[linear[name] for name in names] for linear in linears]
        if len(linears) > 1 and not ON_CPU:  # there a product more costs less than to copy weights
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
    """`model`, to go on behind the positions in `cache` with one token at a time, of one text.

    The cache's arrays are written in place, so that nobody else should hold them.
    """

    def __init__(self, model: Model, cache: list[LayerCache] | None = None):
        args, dtype = model.args, model.norm.weight.dtype
        blank = mx.zeros((1, args.n_kv_heads, 0, args.head_dim), dtype)
        cache = cache or [(blank, blank, 0)] * args.n_layers
        self.cache = [[keys, values] for keys, values, _ in cache]
        self.seen = cache[0][2]
        self.scale = args.head_dim**-0.5
        self.embed, self.norm = model.tok_embeddings, model.norm
        self.output = VectorProduct(model.output)
        # What comes before each layer's attention and what behind it. A GPU has each compiled.
        compiled = (lambda function: function) if ON_CPU else mx.compile
        self.pieces = [
            (compiled(before_attention(layer)), compiled(behind_attention(layer)))
            for layer in model.layers
        ]

    def __call__(self, token: mx.array) -> mx.array:
        """The logits (1, V) of the token behind `token`, (1, 1) integer."""
        x = self.embed(token)  # (1, 1, D)
        position = self.seen if ON_CPU else mx.array(self.seen)  # or each would be compiled anew
        self.seen += 1
        if self.seen > self.cache[0][0].shape[2]:
            for arrays in self.cache:
                arrays[:] = [with_room(array, self.seen - 1, self.seen) for array in arrays]
        new = slice(None), slice(None), slice(self.seen - 1, self.seen)
        filled = slice(None), slice(None), slice(0, self.seen)
        for (before, behind), (keys, values) in zip(self.pieces, self.cache, strict=True):
            queries, keys[new], values[new] = before(x, position)
            x = behind(x, attend(queries, keys[filled], values[filled], self.scale))
        return self.output(self.norm(x))[:, -1]


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


def behind_attention(layer: TransformerBlock) -> Callable:
    """A function that gives what the layer makes of x (1, 1, D) and of what its attention gave,
    (1, H, 1, head_dim).
    """
    feed_forward = layer.feed_forward
    wo, w2 = VectorProduct(layer.attention.wo), VectorProduct(feed_forward.w2)
    w13 = VectorProduct(feed_forward.w1, feed_forward.w3)

    def behind(x: mx.array, attended: mx.array) -> mx.array:
        x = x + wo(attended.reshape(1, 1, -1))
        gate, up = mx.split(w13(layer.ffn_norm(x)), 2, axis=-1)
        return x + w2(swiglu(gate, up) if ON_CPU else nn.silu(gate) * up)  # one kernel, compiled

    return behind
