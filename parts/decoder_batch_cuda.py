"""The layers of decoder_batch with CUDA: attention of many rows is one kernel, with all that comes
before it but for the projections, of decoder_batch_cuda.cu.
"""

import math
from collections.abc import Callable

from parts import device, nvrtc
from parts.decoder import swiglu
from parts.merged_linear import MergedLinear
from parts.ops_cuda import float_bits
from parts.rope import amplitude, frequency_table

import mlx.core as mx
import mlx.nn as nn

THREADS = 128  # of a block


def compiled_kernel(model: nn.Module) -> bytes | None:
    """The code of the kernel for this model; None where it does not compile."""
    args = model.args
    constants = {
        "Number": nvrtc.NUMBER[model.norm.weight.dtype],
        "HEAD_DIM": args.head_dim,
        "N_KV_HEADS": args.n_kv_heads,
        "GROUP": args.n_heads // args.n_kv_heads,
        "HAS_HEAD_NORM": int(args.qk_norm),
        "EPSILON": float(args.norm_eps),
        "AMPLITUDE": amplitude(args.rope),
        "THREADS": THREADS,
    }
    source = nvrtc.read_source("decoder_batch_cuda.cu")
    return nvrtc.compile_kernels(source, tuple(constants.items()))


def kernel_layers(model: nn.Module) -> Callable | None:
    """A function `run(x, place, starts, caches)` that returns what the layers make of x (B, 1, D);
    None where CUDA is not the device, or no kernel fits the model.

    place: (2,), the position of x and its column in the caches; starts: (B,), the first column that
    each row sees, all int32. Keys and values are written into the caches in place, of which MLX
    knows nothing: what is returned has to be evaluated before anything else reads or copies them.
    """
    code = compiled_kernel(model) if device.has_cuda() else None
    if not code:
        return None
    frequencies = frequency_table(model.args.rope)
    layers = [prepare_layer(layer, code, frequencies) for layer in model.layers]

    @mx.compile
    def run(
        x: mx.array, place: mx.array, starts: mx.array, caches: list[list[mx.array]]
    ) -> mx.array:
        for run_layer, cache in zip(layers, caches, strict=True):
            x = run_layer(x, place, starts, *cache)
        return x

    return run


def prepare_layer(layer: nn.Module, code: bytes, frequencies: mx.array) -> Callable:
    """What a layer makes of x (B, 1, D), place, starts, keys and values; see `kernel_layers`."""
    attention, feed_forward = layer.attention, layer.feed_forward
    wqkv = MergedLinear(attention.wq, attention.wk, attention.wv)
    wo, w2 = MergedLinear(attention.wo), MergedLinear(feed_forward.w2)
    w13 = MergedLinear(feed_forward.w1, feed_forward.w3)
    unread = mx.zeros(1, layer.ffn_norm.weight.dtype)
    norms = [
        attention[name].weight if name in attention else unread for name in ("q_norm", "k_norm")
    ]
    n_channels, scale = attention.n_heads * attention.head_dim, attention.scale * math.log2(math.e)

    def attend(
        projected: mx.array, place: mx.array, starts: mx.array, keys: mx.array, values: mx.array
    ) -> mx.array:
        n_rows, n_kv_heads, capacity, _ = keys.shape
        (attended,) = mx.fast.precompiled_cuda_kernel(
            name="rows_attention",
            compiled_source=code,
            inputs=[projected, place, starts, keys, values, *norms, frequencies],
            output_shapes=[(n_rows, 1, n_channels)],
            output_dtypes=[projected.dtype],
            scalars=[capacity, float_bits(scale)],
            grid=(n_rows * n_kv_heads * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
        )
        return attended

    def run_layer(x: mx.array, *places_and_cache: mx.array) -> mx.array:
        attended = attend(wqkv(layer.attention_norm(x)), *places_and_cache)
        x = add_product(x, wo, attended)
        gate, up = mx.split(w13(layer.ffn_norm(x)), 2, axis=-1)
        return add_product(x, w2, swiglu(gate, up))

    return run_layer


def add_product(x: mx.array, linear: MergedLinear, inputs: mx.array) -> mx.array:
    """x plus what a linear layer makes of the inputs: one operation where it is only a matrix."""
    if len(linear.weights[0]) > 1 or linear.lora or linear.bias is not None:
        return x + linear(inputs)
    return mx.addmm(x, inputs, linear.weights[0][0].T)
