"""Generate text: the prompt in pieces, then the network once more, for one token at a time.

With so little to multiply, memory is the limit, and with a GPU the time in which the processor
launches the operations. So layers with one input are one product, and what comes before and after
attention is compiled; with CUDA, a whole layer is one kernel (decoder_cuda).
"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import cached_property, partial

from parts import device, ops
from parts.decoder_cuda import kernel_layers
from parts.kv_cache import KVCache
from parts.merged_linear import MergedLinear, base_linear
from parts.sampling import GREEDY, Sampler, Sampling

import mlx.core as mx
import mlx.nn as nn

PREFILL_STEP = 512  # positions of a prompt that go through the model at once
CUDA_PREFILL_STEP = 2048  # the same with CUDA
PREFETCH = 2  # layers of a prompt that are queued while the device computes another


def empty_caches(model: nn.Module, max_size: int | None = None) -> list[KVCache]:
    """A cache of no positions for each layer."""
    args = model.args
    blank = mx.zeros((1, args.n_kv_heads, 0, args.head_dim), model.norm.weight.dtype)
    return [KVCache(blank, blank, args.sliding_window, max_size) for _ in model.layers]


def read_prompt(model: nn.Module, ids: list[int], caches: list[KVCache]) -> mx.array:
    """What the layers make of the last of `ids`: (1, 1, D), still being computed. Their keys and
    values are appended to `caches`.

    The ids go through the model in pieces of about equal length. A layer is queued when all but the
    `PREFETCH` layers right before it are computed, so that the device never waits for the
    processor, and yet no more layers hold what they work with, such as dequantized weights.
    """
    step = min(prefill_step(model), caches[0].max_update)
    length = -(-len(ids) // -(-len(ids) // step))
    queue = deque()
    for start in range(0, len(ids), length):
        is_last_piece = start + length >= len(ids)
        x = model.tok_embeddings(mx.array([ids[start : start + length]]))
        for layer, cache in zip(model.layers, caches, strict=True):
            is_last = layer is model.layers[-1]
            x = run_layer(layer, x, cache, last_only=is_last)
            # Of a piece before the last, the last layer computes keys and values alone.
            computed = cache.state if is_last and not is_last_piece else [x, *cache.state]
            mx.async_eval(computed)
            # Wait for the layer before the last PREFETCH.
            queue.append(computed)
            if len(queue) > PREFETCH:
                mx.eval(queue.popleft())
    return x


def prefill_step(model: nn.Module) -> int:
    """The positions of a prompt, at most, that go through the model at once: more where quantized
    weights are dequantized for them.
    """
    step = CUDA_PREFILL_STEP if device.has_cuda() else PREFILL_STEP
    return 2 * step if "scales" in base_linear(model.layers[0].feed_forward.w1) else step


def run_layer(layer: nn.Module, x: mx.array, cache: KVCache, last_only: bool) -> mx.array:
    """What a layer makes of x (1, L, D), the positions after those in `cache`, to which their keys
    and values are appended: (1, L, D), or (1, 1, D) for the last position only.
    """
    attention, feed_forward = layer.attention, layer.feed_forward
    queries, keys, values = attention.project(layer.attention_norm(x), cache.offset)
    cache.update(keys, values)
    if last_only:
        x, queries = x[:, -1:], queries[:, :, -1:]
    out = ops.attention(queries, *cache.filled(), attention.scale, attention.window)
    x = add_product(x, attention.wo, out.transpose(0, 2, 1, 3).flatten(-2))
    normed = layer.ffn_norm(x)
    return add_product(x, feed_forward.w2, swiglu(feed_forward.w1(normed), feed_forward.w3(normed)))


def add_product(x: mx.array, linear: nn.Module, inputs: mx.array) -> mx.array:
    """x plus what a linear layer makes of the inputs: one operation where it is only a matrix."""
    if linear.keys() == {"weight"}:
        return mx.addmm(x, inputs, linear.weight.T)
    return x + linear(inputs)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up`; on a GPU, which has no gradient to compute here, as one kernel."""
    return ops.swiglu(gate, up) if device.ON_CPU else fused_swiglu(gate, up)


@partial(mx.compile, shapeless=True)
def fused_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up`."""
    return nn.silu(gate) * up


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
    decoder = decoder or Decoder(model)
    sampler = Sampler(sampling, [prompt_ids])

    def sampled(logits: mx.array) -> mx.array:
        return logits[:, :vocab_size].astype(mx.float32)

    logits = sampled(decoder.prefill(prompt_ids[decoder.offset :]))
    token = sampler(logits)
    mx.async_eval(token)
    if not mx.isfinite(logits).all():
        raise FloatingPointError("the model's logits are not finite: give another --dtype")
    yield token.item()  # before what decodes one token at a time is made ready
    device.give_back_memory()  # of the prompt
    token = sampler(sampled(decoder(token[:, None])))
    while True:
        mx.async_eval(token)  # on its own, so that nobody who wants it waits for the next
        # The device computes the next token while the caller works with this one; or its logits,
        # where the sampler waits for these.
        logits = sampled(decoder(token[:, None]))
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
        self.model, self.max_kv_size = model, max_kv_size
        self.start(caches)
        self.embed, self.norm = model.tok_embeddings, model.norm
        self.output = MergedLinear(model.output_layer)

    def start(self, caches: list[KVCache] | None = None) -> None:
        """Go on from the positions in other caches, by default from none: in ones of at most
        `max_kv_size` positions.
        """
        caches = caches or empty_caches(self.model, self.max_kv_size)
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

    @cached_property
    def run_layers(self) -> Callable:
        """What computes the layers for one token, made ready when the first one comes."""
        return kernel_layers(self.model) or separate_layers(self.model)

    def prefill(self, ids: list[int]) -> mx.array:
        """The logits (1, V) of the token after `ids`, which are not empty and go through the model
        in pieces. After an error, only `start` makes the decoder fit for use.
        """
        mx.eval(self.last)  # and with it all that writes in place what is extended here
        self.last = read_prompt(self.model, ids, self.caches)
        return self.output(self.norm(self.last))[:, -1]

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
    """A function of x (B, 1, D) and its position that returns queries (B, H, 1, head_dim), keys and
    values (B, K, 1, head_dim).
    """
    attention = layer.attention
    n_heads, n_kv_heads = attention.n_heads, attention.n_kv_heads
    wqkv = MergedLinear(attention.wq, attention.wk, attention.wv)

    def before(x: mx.array, position: int | mx.array) -> tuple[mx.array, mx.array, mx.array]:
        heads = wqkv(layer.attention_norm(x)).reshape(len(x), 1, -1, attention.head_dim)
        rotated, values = mx.split(heads, [n_heads + n_kv_heads], axis=2)
        if "q_norm" in attention:
            queries, keys = mx.split(rotated, [n_heads], axis=2)
            rotated = mx.concatenate(attention.normed(queries, keys), axis=2)
        rotated = ops.rope(rotated, position, attention.rope)
        queries, keys = mx.split(rotated, [n_heads], axis=2)
        return tuple(heads.swapaxes(1, 2) for heads in (queries, keys, values))

    return before


def after_attention(layer: nn.Module) -> Callable:
    """A function of x (B, 1, D) and its attention's output (B, H, 1, head_dim) that returns the
    layer's output (B, 1, D).
    """
    feed_forward = layer.feed_forward
    wo, w2 = MergedLinear(layer.attention.wo), MergedLinear(feed_forward.w2)
    w13 = MergedLinear(feed_forward.w1, feed_forward.w3)

    def after(x: mx.array, attended: mx.array) -> mx.array:
        x = x + wo(attended.reshape(len(x), 1, -1))
        gate, up = mx.split(w13(layer.ffn_norm(x)), 2, axis=-1)
        return x + w2(swiglu(gate, up))

    return after
