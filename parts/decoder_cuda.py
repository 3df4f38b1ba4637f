"""The decoder's layers with CUDA: each is one kernel, of decoder_cuda.cu."""

from collections.abc import Callable

import numpy as np

from parts import device, nvrtc
from parts.kv_cache import KVCache
from parts.merged_linear import base_linear, stack_lora
from parts.rope import amplitude, frequency_table

import mlx.core as mx
import mlx.nn as nn

THREADS = 512  # of a block
SHARED_MEMORY = 80_000  # bytes of dynamic shared memory of a block
STATIC_SHARED_MEMORY = 17_000  # bytes that attention takes, up to a head_dim of 256
MAX_SPLITS = 16  # blocks, at most, that the positions of one head are split among


def linear_layers(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The linear layers of a transformer block, in the kernel's order."""
    attention, feed_forward = layer.attention, layer.feed_forward
    projections = attention.wq, attention.wk, attention.wv, attention.wo
    return *projections, feed_forward.w1, feed_forward.w2, feed_forward.w3


def kernel_constants(model: nn.Module) -> dict[str, object] | None:
    """The macros of the kernel's source for this model. Returns None where the model has weights of
    several kinds, LoRA after attention, or what the kernel does not compute.
    """
    args, dtype = model.args, model.norm.weight.dtype
    if args.attention_bias or args.qk_norm or args.sliding_window or amplitude(args.rope) != 1:
        return None
    linears = [base_linear(linear) for layer in model.layers for linear in linear_layers(layer)]
    kinds = {
        (getattr(m, "bits", 0), getattr(m, "group_size", 1), getattr(m, "scales", m.weight).dtype)
        for m in linears
    }
    bits, group_size, dtype_of_one = kinds.pop()
    after_attention = [linear for layer in model.layers for linear in linear_layers(layer)[3:]]
    if kinds or dtype_of_one != dtype or any("lora_a" in linear for linear in after_attention):
        return None
    return {
        "Number": nvrtc.NUMBER[dtype],
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


def kernel_inputs(layer: nn.Module) -> tuple[list[mx.array], int]:
    """The arrays of a layer in the kernel's order, and the sum of its LoRA ranks."""
    norms = [layer.attention_norm.weight, layer.ffn_norm.weight]
    linears = [base_linear(linear) for linear in linear_layers(layer)]
    weights_of_each = [list(linear.parameters().values()) for linear in linears]
    # Layers that are not quantized have no scales and biases. Nobody reads what stands for them.
    weights = [array for arrays in weights_of_each for array in (arrays * 3)[:3]]
    ends = np.cumsum([len(linear.weight) for linear in linears[:3]]).tolist()
    pair = stack_lora(linear_layers(layer)[:3], ends)
    a, b = pair or (mx.zeros((1, 1)), mx.zeros((1, 1)))
    lora = [mx.contiguous(a.T).astype(norms[0].dtype), b.astype(norms[0].dtype)]
    return norms + weights + lora, len(b) if pair else 0


def compiled_kernel(model: nn.Module) -> bytes | None:
    """The code of the kernel for this model; None where GPU, model or compiler do not allow it."""
    max_shared_memory = nvrtc.attribute(nvrtc.MAX_SHARED_MEMORY)
    if max_shared_memory < SHARED_MEMORY + STATIC_SHARED_MEMORY:
        return None
    constants = kernel_constants(model)
    if not constants:
        return None
    return nvrtc.compile_kernels(nvrtc.read_source("decoder_cuda.cu"), tuple(constants.items()))


def kernel_layers(model: nn.Module) -> Callable | None:
    """What `decoder.separate_layers` returns, with one kernel a layer; None where no kernel fits
    the model, or CUDA is not the device.

    Its code is made once in a process, in half a second to one. As the blocks of a kernel wait for
    each other, and fill the GPU, no two of them may run at once.
    """
    code = compiled_kernel(model) if device.has_cuda() else None
    if not code:
        return None
    n_multiprocessors = nvrtc.attribute(nvrtc.MULTIPROCESSORS)
    args, dtype = model.args, model.norm.weight.dtype
    layers = [kernel_inputs(layer) for layer in model.layers]
    frequencies = frequency_table(args.rope)
    barrier = mx.zeros(64, mx.uint64)  # one would lie in memory that MLX shares with the processor
    mx.eval(layers, frequencies, barrier)
    n_projected = (args.n_heads + 2 * args.n_kv_heads) * args.head_dim
    n_split_floats = args.n_heads * MAX_SPLITS * (args.head_dim + 4)

    @mx.compile
    def run(
        x: mx.array, position: mx.array, states: list[list[mx.array]], previous: mx.array
    ) -> mx.array:
        for (arrays, ranks), (keys, values) in zip(layers, states, strict=True):
            x, *_ = mx.fast.precompiled_cuda_kernel(
                name="decoder_layer",
                compiled_source=code,
                inputs=[x, position, *arrays, keys, values, frequencies, barrier, previous],
                output_shapes=[
                    x.shape,
                    (n_projected + ranks,),
                    (n_split_floats,),
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

    previous = mx.zeros((1, 1, args.dim), dtype)

    def run_layers(x: mx.array, caches: list[KVCache]) -> mx.array:
        nonlocal previous  # the layers' output for the last token, so that this one's come after
        states = [cache.state for cache in caches]
        previous = run(x, mx.array(caches[0].offset), states, previous)
        for cache in caches:
            cache.offset += 1  # the kernel has written keys and values
        return previous

    return run_layers
