"""Generate text: the prompt in pieces, then the network once more, for one token at a time.

With so little to multiply, memory is the limit, and with a GPU the time in which the processor
launches the operations. So layers with one input are one product, and what comes before and after
attention is compiled; with CUDA, a whole layer is one kernel (decoder_cuda).
"""

import math
from collections import deque
from collections.abc import Callable, Iterator

from parts import device, ops
from parts.decoder_cuda import kernel_layers
from parts.kv_cache import KVCache
from parts.merged_linear import MergedLinear
from parts.sampling import GREEDY, Sampler, Sampling

import mlx.core as mx
import mlx.nn as nn

PREFILL_STEP = 512  # positions of a prompt that go through the model at once
PREFETCH = 2  # layers of a prompt that are queued while the device computes another


def prefill(
    model: nn.Module, ids: list[int], caches: list[KVCache] | None = None
) -> list[KVCache] | None:
    """The key-value caches, one a layer, after `ids`, which follow what is in `caches`, and go
    through the model in pieces; None without anything. The caches given stay as they are.

    A layer is queued when all but the `PREFETCH` layers right before it are computed, so that the
    device never waits for the processor, and yet no more layers hold what they work with, such as
    dequantized weights.
    """
    caches = list(caches or [None] * len(model.layers))
    length = min(PREFILL_STEP, caches[0].max_update if caches[0] is not None else math.inf)
    for start in range(0, len(ids), length):
        # Queue the layers for this piece of the prompt.
        x = model.tok_embeddings(mx.array([ids[start : start + length]]))
        queue = deque()
        for i, layer in enumerate(model.layers):
            x, caches[i] = layer(x, caches[i])
            mx.async_eval(caches[i].state)  # and not x: only logits need that of the last layer
            # Wait for the layer before the last PREFETCH.
            queue.append(caches[i].state)
            if len(queue) > PREFETCH:
                mx.eval(queue.popleft())
        mx.eval([cache.state for cache in caches])
    device.give_back_memory()
    return caches if caches[0] is not None else None


def generate_step(
    model: nn.Module,
    prompt_ids: list[int],
    sampling: Sampling = GREEDY,
    vocab_size: int | None = None,
    decoder: "Decoder | None" = None,
) -> Iterator[int]:
    """Yield the ids that follow the prompt, without end.

    vocab_size: only so many of the first ids are sampled, by default all. decoder: one of the
    model, whose caches hold the beginning of the prompt, but not its last id; they go on with the
    rest. Raises FloatingPointError where the first logits are not finite.
    """
    model.eval()  # what only training needs is not made ready
    if decoder is None:
        decoder = Decoder(model, prefill(model, prompt_ids[:-1]))
    elif decoder.offset < len(prompt_ids) - 1:
        decoder.start(prefill(model, prompt_ids[decoder.offset : -1], decoder.caches))
    sampler = Sampler(sampling, [prompt_ids])

    def step(ids: mx.array) -> mx.array:
        return decoder(ids)[:, :vocab_size].astype(mx.float32)

    logits = step(mx.array([prompt_ids[-1:]]))
    if not mx.isfinite(logits).all():
        raise FloatingPointError("the model's logits are not finite: give another --dtype")
    token = sampler(logits)
    while True:
        mx.async_eval(token)  # on its own, so that nobody who wants it waits for the next
        # The device computes the next token while the caller works with this one; or its logits,
        # where the sampler waits for these.
        logits = step(token[:, None])
        next_token = None if sampler.waits else sampler(logits)
        mx.async_eval(logits if sampler.waits else next_token)
        yield token.item()
        token = sampler(logits) if sampler.waits else next_token


class Decoder:
    """Decodes one text token by token, from the positions in `caches` on.

    Its caches are written in place, so that nobody else should hold their arrays. With CUDA, what
    one decoder returned should be evaluated before another is called (see `kernel_layers`).
    """

    def __init__(
        self,
        model: nn.Module,
        caches: list[KVCache] | None = None,
        max_kv_size: int | None = None,
    ):
        self.args, self.dtype = model.args, model.norm.weight.dtype
        self.max_kv_size = max_kv_size
        self.start(caches)
        self.embed, self.norm = model.tok_embeddings, model.norm
        self.output = MergedLinear(model.output_layer)
        self.run_layers = kernel_layers(model) or separate_layers(model)

    def start(self, caches: list[KVCache] | None = None) -> None:
        """Go on from the positions in other caches, by default from none: in ones of at most
        `max_kv_size` positions.
        """
        args = self.args
        blank = mx.zeros((1, args.n_kv_heads, 0, args.head_dim), self.dtype)
        blank = KVCache(blank, blank, args.sliding_window, self.max_kv_size)
        caches = caches or [blank] * args.n_layers
        self.caches = [cache.contiguous() for cache in caches]
        self.last = [cache.state for cache in self.caches]  # to compute before the caches grow

    @property
    def offset(self) -> int:
        """The next position."""
        return self.caches[0].offset

    def trim(self, offset: int) -> None:
        """Forget the positions from `offset` on; all of them, where a cache has dropped some that
        the next one would see.
        """
        mx.eval(self.last)
        if not all(cache.trim(offset) for cache in self.caches):
            self.start()

    def __call__(self, token: mx.array) -> mx.array:
        """The logits (1, V) of the token after `token`, (1, 1) integer."""
        if self.caches[0].n_filled == self.caches[0].capacity:
            mx.eval(self.last)  # and with it all that writes in place what is copied here
            for cache in self.caches:
                cache.grow(1)
        self.last = self.run_layers(self.embed(token), self.caches)  # (1, 1, D)
        return self.output(self.norm(self.last))[:, -1]


def separate_layers(model: nn.Module) -> Callable:
    """A function `run(x, caches)` that returns what the layers make of x (1, 1, D), the position
    after those in the caches, and appends its keys and values to them.
    """
    # What comes before each layer's attention and what after it. A GPU has each compiled.
    pieces = [
        (device.compiled(before_attention(layer)), device.compiled(after_attention(layer)))
        for layer in model.layers
    ]

    def run(x: mx.array, caches: list[KVCache]) -> mx.array:
        offset = caches[0].offset
        position = offset if device.ON_CPU else mx.array(offset)  # a number is compiled again
        for layer, (before, after), cache in zip(model.layers, pieces, caches, strict=True):
            queries, keys, values = before(x, position)
            cache.update(keys, values)
            attention = layer.attention
            attended = ops.attention(queries, *cache.filled(), attention.scale, attention.window)
            x = after(x, attended)
        return x

    return run


def before_attention(layer: nn.Module) -> Callable:
    """A function of x (1, 1, D) and its position that returns queries (1, H, 1, head_dim), keys and
    values (1, K, 1, head_dim).
    """
    attention = layer.attention
    n_heads, n_kv_heads = attention.n_heads, attention.n_kv_heads
    wqkv = MergedLinear(attention.wq, attention.wk, attention.wv)

    def before(x: mx.array, position: int | mx.array) -> tuple[mx.array, mx.array, mx.array]:
        heads = wqkv(layer.attention_norm(x)).reshape(1, 1, -1, attention.head_dim)
        rotated, values = mx.split(heads, [n_heads + n_kv_heads], axis=2)
        if "q_norm" in attention:
            queries, keys = mx.split(rotated, [n_heads], axis=2)
            rotated = mx.concatenate(attention.normed(queries, keys), axis=2)
        rotated = ops.rope(rotated, position, attention.rope)
        queries, keys = mx.split(rotated, [n_heads], axis=2)
        return tuple(heads.swapaxes(1, 2) for heads in (queries, keys, values))

    return before


def after_attention(layer: nn.Module) -> Callable:
    """A function of x (1, 1, D) and its attention's output (1, H, 1, head_dim) that returns the
    layer's output (1, 1, D).
    """
    feed_forward = layer.feed_forward
    wo, w2 = MergedLinear(layer.attention.wo), MergedLinear(feed_forward.w2)
    w13 = MergedLinear(feed_forward.w1, feed_forward.w3)

    def swiglu(gate: mx.array, up: mx.array) -> mx.array:
        # On a GPU this is one kernel, compiled.
        return ops.swiglu(gate, up) if device.ON_CPU else nn.silu(gate) * up

    def after(x: mx.array, attended: mx.array) -> mx.array:
        x = x + wo(attended.reshape(1, 1, -1))
        gate, up = mx.split(w13(layer.ffn_norm(x)), 2, axis=-1)
        return x + w2(swiglu(gate, up))

    return after
