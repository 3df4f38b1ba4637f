"""The network of Llama, Mistral and Qwen, with LoRA adapters for its linear layers.

Attributes are named as in Meta's checkpoints, so that the module's parameter paths are the keys of
`weights.npz` (`layers.0.attention.wq.weight`, ...).

Shapes in comments: B rows of a batch, L positions, S positions in the key-value cache, D = `dim`,
H = `n_heads`, K = `n_kv_heads`, V = `vocab_size`.
"""

import math
from dataclasses import dataclass
from functools import partial

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts import ops
from parts.adapters import LORA_SCALE, PROJECTIONS
from parts.config_values import check_values
from parts.dropout import drop
from parts.kv_cache import KVCache
from parts.rope import Rope, make_rope

import mlx.core as mx
import mlx.nn as nn

LORA_PROJECTIONS = ("wq", "wv")
LORA_RANK = 8


@dataclass
class ModelArgs:
    """The shape of a model, as `params.json` holds it. Raises ValueError where a value makes no
    sense.
    """

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    vocab_size: int
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # as in config.json: {"rope_type": "llama3", "factor": 8, ...}
    sliding_window: int | None = None  # positions that a query sees, its own included
    attention_bias: bool = False  # wq, wk and wv have biases
    qk_norm: bool = False  # each head of queries and keys is normalised
    tie_word_embeddings: bool = False  # the embedding is the output projection, too
    model_type: str = "llama"  # or mistral, qwen2, qwen3
    max_position_embeddings: int | None = None  # the context length
    bos_id: int | None = None  # of the token that begins a text
    eos_ids: list[int] | None = None  # of those that end it

    def __post_init__(self) -> None:
        check_values(self, may_be_zero={"bos_id", "eos_ids"}, limits={"n_layers": 1000})
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is no multiple of n_kv_heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd")
        if self.bos_id is not None and self.bos_id >= self.vocab_size:
            raise ValueError(f"bos_id {self.bos_id} is beyond vocab_size {self.vocab_size}")
        _ = self.rope  # it checks its description

    @property
    def rope(self) -> Rope:
        """What decides the angles of rotary positions."""
        context = self.max_position_embeddings
        return make_rope(self.head_dim, self.rope_theta, self.rope_scaling, context)


class QuantizedLinear(nn.QuantizedLinear):
    """MLX's quantized layer, with a faster product where MLX's own is slow."""

    def __call__(self, x: mx.array) -> mx.array:
        """(..., input_dims) to (..., output_dims)."""
        weights = self.weight, self.scales, self.biases
        y = ops.quantized_matmul(x, *weights, self.group_size, self.bits, self.training)
        return y + self.bias if "bias" in self else y


class Linear(nn.Linear):
    """`nn.Linear`, by default without a bias; `nn.quantize` makes it a `QuantizedLinear` of this
    file.
    """

    def __init__(self, input_dims: int, output_dims: int, bias: bool = False):
        super().__init__(input_dims, output_dims, bias)

    def to_quantized(self, group_size: int, bits: int, **_) -> QuantizedLinear:
        """The layer with weights of `bits` bits; `group_size` neighbours of a row share a scale."""
        return QuantizedLinear.from_linear(self, group_size, bits)


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update: `linear(x) + scale (x A) B`.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. Around an
    `nn.QuantizedLinear` it is QLoRA (Dettmers et al., 2023).
    """

    @staticmethod
    def from_linear(
        linear: nn.Linear | nn.QuantizedLinear,
        rank: int = 8,
        scale: float = LORA_SCALE,
        dropout: float = 0.0,
    ) -> "LoRALinear":
        """Wrap `linear`; with `lora_b` at zero the result computes what `linear` does."""
        output_dims, input_dims = linear.weight.shape
        if isinstance(linear, nn.QuantizedLinear):
            input_dims = linear.scales.shape[1] * linear.group_size
        lora = LoRALinear(input_dims, output_dims, rank, scale, dropout)
        lora.linear = linear
        return lora

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        rank: int = 8,
        scale: float = LORA_SCALE,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.linear = Linear(input_dims, output_dims)
        self.scale = scale
        self.dropout = dropout  # the share of the input's values that lora_a does not see
        self._keys = None  # (B, 2) of a training step, by `parts.dropout`; without, all are seen
        bound = 1 / math.sqrt(input_dims)
        self.lora_a = mx.random.uniform(-bound, bound, (input_dims, rank))
        self.lora_b = mx.zeros((rank, output_dims))

    def __call__(self, x: mx.array) -> mx.array:
        """(..., input_dims) to (..., output_dims), in the dtype that the wrapped layer returns."""
        y = self.linear(x)
        if self._keys is not None:
            x = drop(x, self.dropout, self._keys)
        # The float32 matrices are cast: as they are, they would make everything after it float32.
        a, b = self.lora_a.astype(y.dtype), self.lora_b.astype(y.dtype)
        return mx.addmm(y, x @ a, b * self.scale)


def add_lora(
    model: nn.Module,
    layers: list[int],
    projections: tuple[str, ...] | list[str] = LORA_PROJECTIONS,
    rank: int = LORA_RANK,
    scale: float = LORA_SCALE,
    dropout: float = 0.0,
) -> None:
    """Freeze the model, and wrap these projections of the given layers with LoRA matrices. Those
    that it has already stay, and are trained.
    """
    model.freeze()
    model.unfreeze(keys=["lora_a", "lora_b"])
    for i in layers:
        for name in projections:
            block = model.layers[i][PROJECTIONS[name]]
            block[name] = LoRALinear.from_linear(block[name], rank, scale, dropout)


def top_layers(model: nn.Module, n: int) -> list[int]:
    """Return the indices of the last `n` layers, or of all when there are fewer."""
    n_layers = len(model.layers)
    return list(range(max(0, n_layers - n), n_layers))


class RMSNorm(nn.Module):
    """Divide by the root mean square, then scale (Zhang and Sennrich, 2019)."""

    def __init__(self, dims: int, eps: float = 1e-5):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        """(..., dims) to the same shape."""
        return ops.rms_norm(x, self.weight, self.eps)

    def with_residual(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x, and x normalised. In training, the weight may have no gradient."""
        return ops.rms_norm_residual(x, self.weight, self.eps, self.training)


class Attention(nn.Module):
    """Causal attention over grouped heads (Ainslie et al., "GQA", 2023) with rotary positions.

    RoPE (Su et al., 2021) rotates neighbouring pairs of channels, the "traditional" kind, which is
    how Meta's checkpoints store the rows of wq and wk. Mistral has a sliding window (Jiang et al.,
    2023), Qwen 2 biases, Qwen 3 norms of queries and keys (Henry et al., 2020).
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_heads = args.n_heads
        self.n_kv_heads = args.n_kv_heads
        self.head_dim = args.head_dim
        self.scale = args.head_dim**-0.5
        self.window = args.sliding_window
        object.__setattr__(self, "rope", args.rope)  # nn.Module would keep a tuple as parameters
        self.wq = Linear(args.dim, args.n_heads * args.head_dim, args.attention_bias)
        self.wk = Linear(args.dim, args.n_kv_heads * args.head_dim, args.attention_bias)
        self.wv = Linear(args.dim, args.n_kv_heads * args.head_dim, args.attention_bias)
        self.wo = Linear(args.n_heads * args.head_dim, args.dim)
        if args.qk_norm:
            self.q_norm = RMSNorm(args.head_dim, args.norm_eps)
            self.k_norm = RMSNorm(args.head_dim, args.norm_eps)

    def __call__(
        self, x: mx.array, cache: KVCache | None = None, packed: ops.PackedRows | None = None
    ) -> tuple[mx.array, KVCache]:
        """x: (B, L, D), the positions after those in `cache`. Returns (B, L, D) and a new cache.

        packed: of rows that hold several texts.
        """
        offset = cache.offset if cache else 0
        return self.attend(*self.project(x, packed.positions if packed else offset), cache, packed)

    def project(self, x: mx.array, offset: int | mx.array = 0) -> tuple[mx.array, ...]:
        """Queries (B, H, L, head_dim), and keys and values (B, K, L, head_dim).

        offset: the first position, or all (B, L).
        """
        # (B, L, heads, head_dim), then (B, heads, L, head_dim)
        queries, keys, values = (
            layer(x).reshape(*x.shape[:2], -1, self.head_dim)
            for layer in (self.wq, self.wk, self.wv)
        )
        queries, keys = self.normed(queries, keys)
        queries, keys = (
            ops.rope(heads, offset, self.rope, self.training) for heads in (queries, keys)
        )
        return tuple(heads.swapaxes(1, 2) for heads in (queries, keys, values))

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: KVCache | None = None,
        packed: ops.PackedRows | None = None,
    ) -> tuple[mx.array, KVCache]:
        """The output (B, L, D) for what `project` returns, and a new cache."""
        if cache is None:
            cache = KVCache(keys, values, self.window)
        else:
            cache = cache.copy()  # the caller's stays as it is
            cache.update(keys, values)
        out = ops.attention(queries, *cache.filled(), self.scale, self.window, packed)
        return self.wo(out.transpose(0, 2, 1, 3).flatten(-2)), cache

    def normed(self, queries: mx.array, keys: mx.array) -> tuple[mx.array, mx.array]:
        """Both (..., heads, head_dim) as the model's norms make them, if it has any."""
        if "q_norm" not in self:
            return queries, keys
        return self.q_norm(queries), self.k_norm(keys)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, "GLU Variants Improve Transformer", 2020): `w2(silu(w1 x) * w3 x)`."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = Linear(args.dim, args.hidden_dim)
        self.w2 = Linear(args.hidden_dim, args.dim)
        self.w3 = Linear(args.dim, args.hidden_dim)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, L, D) to (B, L, D)."""
        return self.w2(ops.swiglu(self.w1(x), self.w3(x)))


class TransformerBlock(nn.Module):
    """Attention, then the feed-forward network, each normalised before and added to its input."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def __call__(
        self, x: mx.array, cache: KVCache | None = None, packed: ops.PackedRows | None = None
    ) -> tuple[mx.array, KVCache]:
        """x: (B, L, D), the positions after those in `cache`. Returns (B, L, D) and a new cache.

        packed: of rows that hold several texts.
        """
        if cache is not None or not self.training:
            attended, cache = self.attention(self.attention_norm(x), cache, packed)
            x = x + attended
            return x + self.feed_forward(self.ffn_norm(x)), cache
        before = partial(self.before_attention, offset=packed.positions if packed else 0)
        x, *heads = ops.recomputed(self, before)(x)
        attended, cache = self.attention.attend(*heads, packed=packed)
        x, normed = self.ffn_norm.with_residual(x + attended)
        return x + self.feed_forward(normed), cache

    def before_attention(self, x: mx.array, offset: int | mx.array = 0) -> tuple[mx.array, ...]:
        """x, and its queries, keys and values."""
        x, normed = self.attention_norm.with_residual(x)
        return x, *self.attention.project(normed, offset)


class Model(nn.Module):
    """The decoder, from token ids to logits (Touvron et al., "LLaMA", 2023)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.grad_checkpoint = False  # recompute each layer in the backward pass, to save memory
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = [TransformerBlock(args) for _ in range(args.n_layers)]
        self.norm = RMSNorm(args.dim, args.norm_eps)
        if not args.tie_word_embeddings:
            self.output = Linear(args.dim, args.vocab_size)

    @property
    def output_layer(self) -> nn.Module:
        """The module whose `weight` is the output projection: the embedding where they are tied."""
        return self.output if "output" in self else self.tok_embeddings

    @property
    def output_weight(self) -> mx.array:
        """The output projection (V, D), which is never quantized."""
        return self.output_layer.weight

    def __call__(
        self, inputs: mx.array, cache: list[KVCache] | None = None
    ) -> tuple[mx.array, list[KVCache]]:
        """Logits of the token after each position, and the cache to continue with.

        inputs: (B, L) integer token ids, the positions after those in `cache`, which stays as it
        is. Returns logits (B, L, V) in the dtype of the weights, and a new cache, an entry a layer.
        """
        x, cache = self.hidden(inputs, cache)
        return x @ self.output_weight.T, cache

    def hidden(
        self, inputs: mx.array, cache: list[KVCache] | None = None
    ) -> tuple[mx.array, list[KVCache]]:
        """What `__call__` computes but for the output projection: x (B, L, D), normalised.

        inputs: may be (B, L, 2), of rows that hold several texts, none of which sees another: token
        ids, and their positions in their texts.
        """
        inputs, positions = (inputs[..., 0], inputs[..., 1]) if inputs.ndim == 3 else (inputs, None)
        x, packed = self.tok_embeddings(inputs), None  # (B, L, D)
        if positions is not None:
            n_shared = self.args.n_heads // self.args.n_kv_heads
            packed = ops.packed_rows(positions, n_shared, self.args.sliding_window, x.dtype)
        cache = cache or [None] * len(self.layers)
        new_cache = []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            run = partial(layer, packed=packed)
            run = nn.utils.checkpoint(layer, run) if self.grad_checkpoint else run
            x, layer_cache = run(x, layer_cache)
            new_cache.append(layer_cache)
        return self.norm(x), new_cache


def quantizable(name: str, module: nn.Module) -> bool:
    """Whether a quantized model has this module quantized: every linear layer but the output
    projection, which is recognised by its name, since others may have its size.
    """
    return isinstance(module, nn.Linear) and name != "output"
