"""The network, against transformers' Llama and against arithmetic by hand."""

import shutil
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY

from parts import decoder, device, kv_cache, merged_linear
from parts.adapters import PROJECTIONS
from parts.decoder import Decoder

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

import lora
from models import Linear, LoRALinear, Model, ModelArgs, add_lora, quantizable

HF_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def half_split(rows: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Reorder query or key rows from Meta's interleaved pairs to Hugging Face's two halves."""
    head_dim = rows.shape[0] // n_heads
    pairs = rows.reshape(n_heads, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def their_config(args: ModelArgs) -> transformers.PreTrainedConfig:
    return transformers.AutoConfig.for_model(
        args.model_type,
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        intermediate_size=args.hidden_dim,
        rms_norm_eps=args.norm_eps,
        vocab_size=args.vocab_size,
        rope_parameters={
            **(args.rope_scaling or {"rope_type": "default"}),
            "rope_theta": args.rope_theta,
        },
        max_position_embeddings=args.max_position_embeddings or 2048,
        sliding_window=args.sliding_window,
        tie_word_embeddings=args.tie_word_embeddings,
        attn_implementation="eager",
    )


def reference(args: ModelArgs, seed: int = 0) -> tuple[transformers.PreTrainedModel, Model]:
    """transformers' model with random weights, norms and biases, and ours with the same ones."""
    torch.manual_seed(seed)
    theirs = transformers.AutoModelForCausalLM.from_config(their_config(args)).eval()
    heads = {"wq": args.n_heads, "wk": args.n_kv_heads, "q_norm": 1, "k_norm": 1}
    weights = {}

    def fill(our_name: str, module: torch.nn.Module) -> None:
        n_heads = heads.get(our_name.split(".")[-1])
        for kind, parameter in module.named_parameters():
            value = torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 0.08)
            value = value + (1 if kind == "weight" and parameter.ndim == 1 else 0)
            weights[f"{our_name}.{kind}"] = mx.array(value.numpy())
            parameter.data.copy_(half_split(value, n_heads) if n_heads else value)

    fill("tok_embeddings", theirs.model.embed_tokens)
    fill("norm", theirs.model.norm)
    if not args.tie_word_embeddings:
        fill("output", theirs.lm_head)
    names = dict(HF_NAMES)
    if args.qk_norm:
        names.update({f"attention.{name}": f"self_attn.{name}" for name in ("q_norm", "k_norm")})
    for i, layer in enumerate(theirs.model.layers):
        for ours, name in names.items():
            fill(f"layers.{i}.{ours}", layer.get_submodule(name))
    model = Model(args)
    model.load_weights(list(weights.items()))
    return theirs, model


@pytest.fixture(params=[(4, 10000.0), (2, 10000.0), (1, 500000.0)], ids=str)
def args(request) -> ModelArgs:
    n_kv_heads, theta = request.param
    return ModelArgs(**{**TINY, "n_kv_heads": n_kv_heads, "rope_theta": theta, "vocab_size": 300})


TOKENS = np.random.default_rng(0).integers(0, 300, (2, 40))


def expected_logits(theirs: transformers.LlamaForCausalLM) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.tensor(TOKENS)).logits.numpy()


def test_logits_equal_transformers_in_one_pass(args):
    theirs, ours = reference(args)
    logits, _ = ours(mx.array(TOKENS))
    np.testing.assert_allclose(logits, expected_logits(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("cuts", [range(1, 40), [7, 8, 9, 30], [39]], ids=str)
def test_logits_equal_transformers_with_the_cache(args, cuts):
    theirs, ours = reference(args)
    cache, pieces = None, []
    for piece in np.split(TOKENS, list(cuts), axis=1):
        logits, cache = ours(mx.array(piece), cache)
        pieces.append(np.array(logits))
    np.testing.assert_allclose(
        np.concatenate(pieces, axis=1), expected_logits(theirs), atol=1e-4, rtol=0
    )


def test_a_cache_that_has_grown_twice_still_gives_the_logits_of_one_pass():
    args = ModelArgs(**{**TINY, "vocab_size": 300, "n_layers": 2})
    _, model = reference(args)
    tokens = mx.array(np.random.default_rng(1).integers(0, 300, (1, 600)))
    at_once, _ = model(tokens)
    cache, last = None, []
    for start, stop in [(0, 10), (10, 250), *((i, i + 1) for i in range(250, 600))]:
        logits, cache = model(tokens[:, start:stop], cache)
        last.append(logits[:, -1])
    expected = np.array(at_once)[:, [9, 249, *range(250, 600)]]
    np.testing.assert_allclose(np.stack(last, axis=1), expected, atol=1e-4, rtol=0)


def test_two_continuations_of_one_cache_do_not_disturb_each_other():
    _, model = reference(ModelArgs(**{**TINY, "vocab_size": 300}))
    _, cache = model(mx.array(TOKENS[:, :8]))
    _, cache = model(mx.array(TOKENS[:, 8:9]), cache)
    first, first_cache = model(mx.array(TOKENS[:, 9:10]), cache)
    _, _ = model(mx.array(TOKENS[:, 20:21]), cache)
    again, _ = model(mx.array(TOKENS[:, 10:11]), first_cache)
    at_once, _ = model(mx.array(TOKENS[:, :11]))
    np.testing.assert_allclose(again[:, 0], at_once[:, 10], atol=1e-4, rtol=0)
    np.testing.assert_allclose(first[:, 0], at_once[:, 9], atol=1e-4, rtol=0)


def go_as_on_a_gpu(monkeypatch) -> None:
    """Have a CPU compute what a GPU does, but for the kernels of CUDA."""
    if device.ON_CPU and not shutil.which("g++"):
        pytest.skip("MLX compiles for a CPU with g++")
    monkeypatch.setattr(device, "ON_CPU", False)


@pytest.fixture(params=["here", "as on a GPU"])
def both_ways(request, monkeypatch) -> None:
    if request.param == "as on a GPU":
        go_as_on_a_gpu(monkeypatch)


@pytest.mark.parametrize("way", ["one core", "all cores", "as on a GPU"])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("bits", [16, 8, 4, 3])
def test_a_decoder_gives_the_logits_of_the_model_and_leaves_it_as_it_was(
    bits, adapted, way, monkeypatch
):
    if way == "all cores":
        monkeypatch.setattr(merged_linear, "MIN_BYTES_TO_SPLIT", 0)
    monkeypatch.setattr(kv_cache, "STEP", 256)
    if way == "as on a GPU":
        go_as_on_a_gpu(monkeypatch)
    _, model = reference(ModelArgs(**{**TINY, "vocab_size": 300}))
    if bits < 16:
        nn.quantize(model, 32, bits, class_predicate=quantizable)
    if adapted:
        add_lora(model, [1, 2])
        for layer in model.layers[1:]:
            for adapter in (layer.attention.wq, layer.attention.wv):
                adapter.lora_b = mx.random.normal(adapter.lora_b.shape) * 0.1
    before = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    tokens = mx.array(np.random.default_rng(1).integers(0, 300, (1, 270)))
    at_once, _ = model(tokens)

    _, cache = model(tokens[:, :250])
    decoder = Decoder(model, cache)
    logits = [decoder(tokens[:, i : i + 1]) for i in range(250, 270)]  # the cache grows at 256
    np.testing.assert_allclose(mx.stack(logits, 1), at_once[:, 250:], atol=2e-4, rtol=0)
    decoder = Decoder(model)
    np.testing.assert_allclose(decoder(tokens[:, :1]), at_once[:, 0], atol=2e-4, rtol=0)

    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_a_prompt_in_pieces_and_one_after_it_give_the_logits_of_one_pass(
    window, adapted, both_ways, monkeypatch
):
    monkeypatch.setattr(decoder, "PREFILL_STEP", 8)
    _, model = reference(ModelArgs(**{**TINY, "vocab_size": 300, "sliding_window": window}))
    if adapted:
        add_lora(model, [1, 2], ["wq", "wo", "w2"])
        model.layers[1].attention.wo.lora_b += 0.1
    model.eval()
    tokens = np.random.default_rng(1).integers(0, 300, 23).tolist()
    expected = model(mx.array([tokens]))[0][0, [19, 20, 21, 22]]
    decode = Decoder(model)
    logits = [decode.prefill(tokens[:20]), decode(mx.array([tokens[20:21]]))]
    logits += [decode.prefill(tokens[21:22]), decode(mx.array([tokens[22:]]))]
    np.testing.assert_allclose(mx.concatenate(logits), expected, atol=1e-4, rtol=0)


def test_decoders_of_a_model_share_its_merged_weights(monkeypatch):
    go_as_on_a_gpu(monkeypatch)
    _, model = reference(ModelArgs(**{**TINY, "vocab_size": 300}))
    merged = []
    for _ in range(2):
        Decoder(model)(mx.array([[1]]))
        merged.append([layer.attention.wk.weight for layer in model.layers])
    assert all(a is b for a, b in zip(*merged, strict=True))
    # Another weight is merged again.
    model.layers[0].attention.wk.weight = mx.zeros_like(merged[0][0])
    expected = model(mx.array([[1]]))[0][:, -1]
    np.testing.assert_allclose(Decoder(model)(mx.array([[1]])), expected, atol=1e-4, rtol=0)


def add_lora_to_both(
    args: ModelArgs,
    theirs: transformers.LlamaForCausalLM,
    ours: Model,
    projections: tuple[str, ...] = ("wq", "wv"),
) -> dict[str, torch.Tensor]:
    """Random LoRA matrices in the upper two layers of both models; gives torch's by their paths."""
    rng = np.random.default_rng(2)
    add_lora(ours, [1, 2], projections, rank=4)
    matrices, leaves = {}, {}
    for i in (1, 2):
        for name in projections:
            path = f"{PROJECTIONS[name]}.{name}"
            module = theirs.model.layers[i].get_submodule(HF_NAMES[path])
            heads = {"wq": args.n_heads, "wk": args.n_kv_heads}.get(name)
            n_outputs, n_inputs = module.weight.shape
            a = rng.normal(0, 0.1, (n_inputs, 4)).astype(np.float32)
            b = rng.normal(0, 0.1, (4, n_outputs)).astype(np.float32)
            key = f"layers.{i}.{path}"
            matrices[f"{key}.lora_a"], matrices[f"{key}.lora_b"] = mx.array(a), mx.array(b)
            leaf_a = leaves[f"{key}.lora_a"] = torch.tensor(a, requires_grad=True)
            leaf_b = leaves[f"{key}.lora_b"] = torch.tensor(b, requires_grad=True)

            def add_update(_, x, y, a=leaf_a, b=leaf_b, heads=heads):
                columns = half_split(b.T, heads).T if heads else b
                return y + 2.0 * (x[0] @ a) @ columns

            module.register_forward_hook(add_update)
    ours.update(tree_unflatten(list(matrices.items())))
    return leaves


def loss_of_theirs(
    theirs: transformers.LlamaForCausalLM, tokens: np.ndarray, lengths: list[int]
) -> torch.Tensor:
    """Mean cross-entropy over the first so many targets of each row."""
    logits = theirs(torch.tensor(tokens[:, :-1])).logits
    rows = [
        torch.nn.functional.cross_entropy(
            logits[row, :n], torch.tensor(tokens[row, 1 : n + 1]), reduction="none"
        )
        for row, n in enumerate(lengths)
    ]
    return torch.cat(rows).mean()


# The longer one is more than a CPU's attention takes at once.
@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(("length", "lengths"), [(40, [39, 17]), (300, [299, 140])], ids=str)
def test_lora_gradients_equal_torch_autograd_of_the_same_formula(length, lengths):
    args = ModelArgs(**{**TINY, "vocab_size": 300})
    theirs, ours = reference(args)
    leaves = add_lora_to_both(args, theirs, ours, tuple(PROJECTIONS))
    tokens = np.random.default_rng(0).integers(0, 300, (2, length))
    expected = loss_of_theirs(theirs, tokens, lengths)
    expected.backward()

    batch = mx.array(tokens)
    (value, n_tokens), gradients = nn.value_and_grad(ours, lora.loss)(
        ours, batch[:, :-1], batch[:, 1:], mx.array(lengths)
    )
    assert n_tokens.item() == sum(lengths)
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    assert len(leaves) == 2 * 7 * 2
    for key, leaf in leaves.items():
        gradient = gradients
        for part in key.split("."):
            gradient = gradient[int(part) if part.isdigit() else part]
        scale = leaf.grad.abs().max().item()
        np.testing.assert_allclose(np.array(gradient) / scale, leaf.grad / scale, atol=1e-4)


class Training(NamedTuple):
    """200 iterations over eight batches of two rows, learnt in turn, and their losses."""

    tokens: np.ndarray  # (8, 2, 31)
    lengths: np.ndarray  # (8, 2), of the targets
    rate: float
    losses: list[float]

    order = [*range(8)] * 25


def small_pair() -> tuple[transformers.PreTrainedModel, Model, dict[str, torch.Tensor]]:
    """The same model with the same adapters in torch and here, and torch's LoRA matrices."""
    args = ModelArgs(**{**TINY, "vocab_size": 300})
    theirs, ours = reference(args)
    return theirs, ours, add_lora_to_both(args, theirs, ours)


@pytest.fixture(scope="module")
def trained_by_torch() -> Training:
    """By plain code: autograd, and Adam as its paper has it, without the correction of the bias."""
    theirs, _, leaves = small_pair()
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 300, (8, 2, 31))
    lengths = rng.integers(10, 31, (8, 2))
    rate, beta1, beta2, eps = 2e-3, 0.9, 0.999, 1e-8
    moments = {
        key: [torch.zeros_like(leaf), torch.zeros_like(leaf)] for key, leaf in leaves.items()
    }
    losses = []
    for i in Training.order:
        value = loss_of_theirs(theirs, tokens[i], lengths[i].tolist())
        value.backward()
        with torch.no_grad():
            for key, leaf in leaves.items():
                mean, square = moments[key]
                mean.mul_(beta1).add_(leaf.grad, alpha=1 - beta1)
                square.mul_(beta2).addcmul_(leaf.grad, leaf.grad, value=1 - beta2)
                leaf -= rate * mean / (square.sqrt() + eps)
                leaf.grad = None
        losses.append(value.item())
    return Training(tokens, lengths, rate, losses)


@pytest.mark.usefixtures("both_ways")
def test_the_losses_of_200_iterations_are_those_of_plain_torch_code(trained_by_torch):
    expected = trained_by_torch
    _, ours, _ = small_pair()
    optimizer = optim.Adam(expected.rate)
    step = lora.make_step(ours, optimizer, lora.loss, device.open_streams(2))
    batches = mx.array(expected.tokens)
    losses = []
    for i in expected.order:
        batch = batches[i, :, :-1], batches[i, :, 1:], mx.array(expected.lengths[i])
        losses.append(step(*batch)[0].item())
    np.testing.assert_allclose(losses, expected.losses, atol=1e-3, rtol=0)
    assert expected.losses[-1] < expected.losses[0] - 0.2


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_an_adapter_keeps_the_dtype_of_the_layer_that_it_wraps(dtype):
    linear = nn.Linear(64, 32, bias=False)
    linear.set_dtype(dtype)
    layer = LoRALinear.from_linear(linear)
    assert layer.lora_a.dtype == layer.lora_b.dtype == mx.float32
    assert layer(mx.ones((2, 3, 64), dtype)).dtype == dtype


def test_an_adapter_computes_the_formula_of_the_paper():
    layer = LoRALinear.from_linear(nn.Linear(64, 32, bias=False), rank=5)
    assert layer.lora_a.shape == (64, 5)
    assert np.abs(layer.lora_a).max() <= 1 / 8
    assert np.array(layer.lora_b).tolist() == np.zeros((5, 32)).tolist()
    layer.lora_b = mx.random.normal((5, 32))
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    w, a, b = (np.array(m) for m in (layer.linear.weight, layer.lora_a, layer.lora_b))
    np.testing.assert_allclose(layer(mx.array(x)), x @ w.T + 2 * (x @ a) @ b, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_input_size_of_a_quantized_layer_is_that_of_the_layer_it_was(bits):
    linear = nn.QuantizedLinear.from_linear(nn.Linear(256, 96, bias=False), 64, bits)
    layer = LoRALinear.from_linear(linear)
    assert layer.lora_a.shape == (256, 8)
    assert layer.lora_b.shape == (8, 96)
    assert layer(mx.ones((2, 256))).shape == (2, 96)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_quantized_layer_computes_what_its_dequantized_weights_say_and_so_does_its_gradient(bits):
    layer = Linear(128, 96).to_quantized(group_size=32, bits=bits)
    parts = (layer.weight, layer.scales, layer.biases)
    weight = np.array(mx.dequantize(*parts, group_size=32, bits=bits))
    rng = np.random.default_rng(bits)
    for rows in (1, 2, 3, 50):
        x = rng.normal(size=(1, rows, 128)).astype(np.float32)
        upstream = rng.normal(size=(1, rows, 96)).astype(np.float32)
        for mode in (layer.eval(), layer.train()):
            np.testing.assert_allclose(mode(mx.array(x)), x @ weight.T, atol=1e-4)
        gradient = mx.grad(lambda x, u=upstream: (layer(x) * mx.array(u)).sum())(mx.array(x))
        np.testing.assert_allclose(gradient, upstream @ weight, atol=1e-4)


def test_a_prompt_holds_the_dequantized_weights_of_few_layers():
    """A GPU that is handed all layers at once holds those of all of them, in 16 bits."""
    args = ModelArgs(256, 12, 64, 512, 4, 2, 1e-5, 300)
    model = Model(args).eval()
    nn.quantize(model, 32, 4, class_predicate=lambda name, m: isinstance(m, Linear))
    mx.eval(model.parameters())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(Decoder(model).prefill([1] * 40))
    a_layer = 4 * 256 * (2 * 256 + 2 * 128 + 3 * 512)
    assert mx.get_peak_memory() - before < 6 * a_layer
