"""The decoder's layers with CUDA: each is one kernel, of decoder_cuda.cu."""

from collections.abc import Callable, Iterator

from parts import device, nvrtc
from parts.kv_cache import KVCache
from parts.merged_linear import base_linear, stack_biases
from parts.rope import amplitude, frequency_table

import mlx.core as mx
import mlx.nn as nn

THREADS = 512  # of a block
SHARED_MEMORY = 82_000  # bytes of dynamic shared memory of a block
STATIC_SHARED_MEMORY = 17_000  # bytes that attention takes, up to a head_dim of 256
MAX_SPLITS = 16  # blocks, at most, that the positions of one head are split among


def linear_layers(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The linear layers of a transformer block, in the kernel's order."""
    return sum(lora_groups(layer)[:2], ()) + tuple(
        layer.feed_forward[n] for n in ("w1", "w2", "w3")
    )


def lora_groups(layer: nn.Module) -> list[tuple[nn.Module, ...]]:
    """The linear layers of a transformer block, together where they have the same input."""
    attention, feed_forward = layer.attention, layer.feed_forward
    return [
        (attention.wq, attention.wk, attention.wv),
        (attention.wo,),
        (feed_forward.w1, feed_forward.w3),
        (feed_forward.w2,),
    ]


def kernel_constants(model: nn.Module) -> dict[str, object] | None:
    """The macros of the kernel's source for this model; None where it has weights of several kinds,
    or biases where the kernel adds none.
    """
    args, dtype = model.args, model.norm.weight.dtype
    linears = [list(map(base_linear, linear_layers(layer))) for layer in model.layers]
    kinds = {
        (getattr(m, "bits", 0), getattr(m, "group_size", 1), getattr(m, "scales", m.weight).dtype)
        for linear in linears
        for m in linear
    }
    bits, group_size, dtype_of_one = kinds.pop()
    if kinds or dtype_of_one != dtype or any("bias" in m for linear in linears for m in linear[3:]):
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
        "HAS_BIAS": int(any("bias" in m for linear in linears for m in linear[:3])),
        "HAS_HEAD_NORM": int("q_norm" in model.layers[0].attention),
        "WINDOW": args.sliding_window or 0,
        "AMPLITUDE": amplitude(args.rope),
        "EPSILON": float(args.norm_eps),
        "THREADS": THREADS,
        "SHARED_MEMORY": SHARED_MEMORY,
        "MAX_SPLITS": MAX_SPLITS,
    }


def kernel_inputs(layer: nn.Module) -> tuple[list[mx.array], list[int]]:
    """The arrays of a layer in the kernel's order, and the LoRA rank of each of its groups."""
    attention, dtype = layer.attention, layer.attention_norm.weight.dtype
    unread = mx.zeros(1, dtype)  # in place of what the layer does not have
    inputs = [layer.attention_norm.weight, layer.ffn_norm.weight]
    inputs += [attention[n].weight if n in attention else unread for n in ("q_norm", "k_norm")]
    linears = [base_linear(linear) for linear in linear_layers(layer)]
    bias = stack_biases(linears[:3])
    inputs.append(unread if bias is None else bias.astype(dtype))
    for linear in linears:
        inputs += [linear.get(name, unread) for name in ("weight", "scales", "biases")]
    ranks = []
    for group in lora_groups(layer):
        pair = padded_lora(group, dtype)
        inputs += pair or [unread, unread]
        ranks.append(pair[1].shape[1] if pair else 0)
    return inputs, ranks


def padded_lora(layers: tuple[nn.Module, ...], dtype: mx.Dtype) -> list[mx.array]:
    """The LoRA pairs of layers with the same input, transposed, with one rank R for all: rows (R
    for each layer, D), and (all outputs, R) times each layer's scale. The rest is zeros: a row of
    the latter is a whole number of 16 bytes.

    Returns an empty list where no layer is adapted.
    """
    ranks = [layer.lora_a.shape[1] if "lora_a" in layer else 0 for layer in layers]
    multiple = 16 // dtype.size
    rank = -(-max(ranks) // multiple) * multiple
    if not rank:
        return []
    dims = next(len(layer.lora_a) for layer in layers if "lora_a" in layer)
    rows, outputs = [], []
    for layer, own in zip(layers, ranks, strict=True):
        if own:
            a, b = layer.lora_a.T, layer.lora_b.T * layer.scale
            rows.append(mx.pad(a, ((0, rank - own), (0, 0))))
            outputs.append(mx.pad(b, ((0, 0), (0, rank - own))))
        else:
            rows.append(mx.zeros((rank, dims)))
            outputs.append(mx.zeros((len(layer.weight), rank)))
    return [mx.contiguous(mx.concatenate(m).astype(dtype)) for m in (rows, outputs)]


def compiled_kernel(model: nn.Module) -> bytes | None:
    """The code of the kernel for this model; None where GPU, model or compiler do not allow it."""
    max_shared_memory = nvrtc.attribute(nvrtc.MAX_SHARED_MEMORY)
    if max_shared_memory < SHARED_MEMORY + STATIC_SHARED_MEMORY:
        return None
    constants = kernel_constants(model)
    if not constants:
        return None
    source = nvrtc.read_source("tensor_cores.cuh", "decoder_products.cuh", "decoder_cuda.cu")
    return nvrtc.compile_kernels(source, tuple(constants.items()))


def kernel_layers(model: nn.Module) -> Callable | None:
    """What `decoder.separate_layers` returns, with one kernel a layer; None where no kernel fits
    the model, or CUDA is not the device.

    Its code is made once in a process, in half a second to one. As the blocks of a kernel wait for
    each other, and fill the GPU, no two of them may run at once. The model keeps what is returned
    for the next text, until one of its arrays is another.
    """
    if not device.has_cuda():
        return None
    before, run = getattr(model, "kernel_layers", ([], None))
    values = list(values_of(model))
    if len(before) == len(values) and all(a is b for a, b in zip(before, values, strict=True)):
        return run
    run = prepare_layers(model)
    object.__setattr__(model, "kernel_layers", (values, run))  # which are no parameters
    return run


def values_of(module: nn.Module) -> Iterator[object]:
    """All that a module and those in it compute with: arrays, and scales of LoRA matrices."""
    if "lora_a" in module:
        yield module.scale
    children = list(module.values()) if isinstance(module, dict) else module
    for child in children:
        if isinstance(child, dict | list):
            yield from values_of(child)
        else:
            yield child


def prepare_layers(model: nn.Module) -> Callable | None:
    """See `kernel_layers`, which keeps what this returns."""
    code = compiled_kernel(model)
    if not code:
        return None
    n_multiprocessors = nvrtc.attribute(nvrtc.MULTIPROCESSORS)
    args, dtype = model.args, model.norm.weight.dtype
    layers = [kernel_inputs(layer) for layer in model.layers]
    frequencies = frequency_table(args.rope)
    # Arrays of 8 bytes lie in memory that MLX shares with the processor: what it writes, such as
    # the place of a token, is there at once. What the GPU writes is longer, for its sake.
    barrier = mx.zeros(64, mx.uint64)
    mx.eval(layers, frequencies, barrier)
    n_projected = (args.n_heads + 2 * args.n_kv_heads) * args.head_dim
    n_split_floats = args.n_heads * MAX_SPLITS * (args.head_dim + 4)

    @mx.compile
    def run(
        x: mx.array, place: mx.array, states: list[list[mx.array]], previous: mx.array
    ) -> mx.array:
        for (arrays, ranks), (keys, values) in zip(layers, states, strict=True):
            x, *_ = mx.fast.precompiled_cuda_kernel(
                name="decoder_layer",
                compiled_source=code,
                inputs=[x, place, *arrays, keys, values, frequencies, barrier, previous],
                output_shapes=[
                    x.shape,
                    (n_projected,),
                    (n_split_floats,),
                    x.shape,
                    (args.hidden_dim,),
                    (7 * max(ranks) + 64,),  # all seven projections at most
                    (len(ranks),),
                ],
                output_dtypes=[dtype, mx.float32, mx.float32, dtype, dtype, mx.float32, mx.uint64],
                scalars=[*ranks, keys.shape[2]],
                grid=(n_multiprocessors * THREADS, 1, 1),
                threadgroup=(THREADS, 1, 1),
                shared_memory=SHARED_MEMORY,
            )
        return x

    previous = mx.zeros((1, 1, args.dim), dtype)

    def run_layers(x: mx.array, caches: list[KVCache]) -> mx.array:
        nonlocal previous  # the layers' output for the last token, so that this one's come after
        states = [cache.state for cache in caches]
        place = mx.array([caches[0].offset, caches[0].n_filled])
        previous = run(x, place, states, previous)
        for cache in caches:
            cache.offset += 1  # the kernel has written keys and values
        return previous

    return run_layers
