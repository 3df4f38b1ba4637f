"""Every layout of a family's model, written by transformers or as Meta and Mistral do, converts to
the same bytes; what cannot be run is refused by its name.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import MISTRAL_TOKENIZER, call_script, write_quick_tokenizer
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece
from tokenizers.models import WordLevel

import lora
from models import Model, ModelArgs
from parts.hugging_face import params_of, permute
from parts.lazy_tensors import LazyTensor

import mlx.core as mx
from mlx.utils import tree_flatten

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
META = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 32,
    "norm_eps": 1e-5,
}
MISTRAL = {
    "dim": 64,
    "n_layers": 2,
    "head_dim": 16,
    "hidden_dim": 96,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 1000,
}


class Family(NamedTuple):
    """A model's class, its values in config.json but for SHAPE, and its release's params.json."""

    kind: str
    config: dict
    params: dict | None = None


def plain(theta: float) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


# The values are those of the real releases, but for the sizes.
FAMILIES = {
    "Llama 1": Family(
        "Llama",
        {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        {**META, "norm_eps": 1e-6, "vocab_size": -1},
    ),
    "Llama 2": Family("Llama", {"max_position_embeddings": 4096}, {**META, "vocab_size": -1}),
    "CodeLlama": Family(
        "Llama",
        {"max_position_embeddings": 16384, **plain(1e6)},
        {**META, "rope_theta": 1000000, "vocab_size": -1},
    ),
    "Llama 3": Family(
        "Llama",
        {"max_position_embeddings": 8192, **plain(5e5)},
        {**META, "rope_theta": 500000.0, "vocab_size": 1000, "ffn_dim_multiplier": 1.3},
    ),
    "Llama 3.1": Family(
        "Llama",
        {"max_position_embeddings": 131072, "rope_parameters": LLAMA3},
        {**META, "rope_theta": 500000.0, "vocab_size": 1000, "use_scaled_rope": True},
    ),
    "Llama 3.2": Family(
        "Llama",
        {
            "max_position_embeddings": 131072,
            "rope_parameters": {**LLAMA3, "factor": 32.0},
            "tie_word_embeddings": True,
        },
        {**META, "rope_theta": 500000.0, "vocab_size": 1000, "use_scaled_rope": True},
    ),
    "Mistral 7B v0.1": Family(
        "Mistral",
        {"max_position_embeddings": 32768, "sliding_window": 4096},
        {**MISTRAL, "sliding_window": 4096},
    ),
    "Mistral 7B v0.3": Family(
        "Mistral",
        {"max_position_embeddings": 32768, "sliding_window": None, **plain(1e6)},
        {**MISTRAL, "rope_theta": 1000000.0},
    ),
    "Mistral Small": Family(
        "Mistral",
        {
            "head_dim": 32,
            "max_position_embeddings": 32768,
            "sliding_window": None,
            **plain(1e8),
        },
        {**MISTRAL, "head_dim": 32, "rope_theta": 100000000.0, "max_seq_len": 32768},
    ),
    "Qwen 2": Family(
        "Qwen2", {"max_position_embeddings": 32768, "tie_word_embeddings": True, **plain(1e6)}
    ),
    "Qwen 2.5 1M": Family(
        "Qwen2",
        {
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
        },
    ),
    "Qwen 3": Family(
        "Qwen3",
        {
            "head_dim": 32,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
            **plain(1e6),
        },
    ),
    "DeepSeek Coder": Family(
        "Llama",
        {
            "max_position_embeddings": 16384,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
        },
    ),
}


def make_model(family: Family) -> transformers.PreTrainedModel:
    """A random model of the family, in float32, whose weights float16 holds."""
    config = getattr(transformers, f"{family.kind}Config")(**{**SHAPE, **family.config})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family.kind}ForCausalLM")(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), 0.1)
            parameter.copy_(parameter.half())
    return model


OUR_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "model.layers": "layers",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def releases_tensors(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """A Llama's or Mistral's tensors as Meta and Mistral have them; the output is stored always."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in OUR_NAMES.items():
            name = name.replace(f"{theirs}.", f"{ours}.")
        if ".wq." in name or ".wk." in name:  # two halves of each head become pairs of rows
            heads = 4 if ".wq." in name else 2
            tensor = tensor.reshape(heads, 2, -1, 64).transpose(1, 2).reshape(-1, 64)
        tensors[name] = tensor.clone()
    return tensors


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


def write_release(folder: Path, model, params: dict, n: int = 0, by_rows: bool = True) -> None:
    """Write a model as Meta does, in `n` parts, of the embedding's rows or columns; or, with 0, as
    Mistral does.
    """
    folder.mkdir()
    tensors = releases_tensors(model)
    if not n:
        safetensors.torch.save_file(tensors, folder / "consolidated.safetensors")
    columns = ("wo", "w2") if by_rows else ("wo", "w2", "tok_embeddings")
    for i in range(n):
        part = {}
        for name, tensor in tensors.items():
            axis = int(name.split(".")[-2] in columns)
            part[name] = tensor if tensor.ndim == 1 else tensor.chunk(n, axis)[i].clone()
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    write_json(folder / "params.json", params)


def write_old(folder: Path, model) -> None:
    """Write a model as transformers 4 did: the scaling of RoPE has no base; torch's own files,
    which have tied embeddings twice.
    """
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    config = model.config.to_dict()
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    if kind == "llama3":
        config["rope_scaling"]["rope_type"] = config["rope_scaling"].pop("type")
    write_json(folder / "config.json", config)


def convert(folder: Path, target: Path, *flags):
    return call_script("convert.py", "--torch-path", folder, "--mlx-path", target, *flags)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_quick_tokenizer(folder)
    return folder / "tokenizer.model"


@pytest.mark.parametrize("name", FAMILIES)
def test_all_layouts_of_a_model_give_equal_bytes_and_transformers_logits(name, tokenizer, tmp_path):
    family = FAMILIES[name]
    model = make_model(family)
    layouts = {"hugging-face": lambda folder: model.save_pretrained(folder)}
    layouts["sharded"] = lambda folder: model.save_pretrained(folder, max_shard_size="100KB")
    layouts["transformers-4"] = lambda folder: write_old(folder, model)
    if family.params:
        layouts["consolidated"] = lambda folder: write_release(folder, model, family.params)
        layouts["one"] = lambda folder: write_release(folder, model, family.params, 1)
        layouts["two"] = lambda folder: write_release(folder, model, family.params, 2)
        layouts["columns"] = lambda folder: write_release(folder, model, family.params, 2, False)
    written = {}
    for layout, write in layouts.items():
        write(tmp_path / layout)
        shutil.copy(tokenizer, tmp_path / layout)
        process = convert(tmp_path / layout, tmp_path / "mlx" / layout)
        assert process.returncode == 0, process.stderr
        assert process.stderr == ""
        written[layout] = contents(tmp_path / "mlx" / layout)
    for layout in written:
        assert written[layout] == written["hugging-face"], layout

    ours, _ = lora.load_model(tmp_path / "mlx" / "sharded", mx.float32)
    tokens = np.random.default_rng(0).integers(0, 1000, (2, 40))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours(mx.array(tokens))[0], expected, atol=1e-4)


def params_json(folder: Path) -> dict:
    return json.loads((folder / "params.json").read_text())


def names_in(folder: Path) -> set[str]:
    with np.load(folder / "weights.npz") as weights:
        return set(weights.files)


@pytest.fixture(scope="module")
def qwen(tokenizer, tmp_path_factory) -> tuple[Path, transformers.PreTrainedModel]:
    """A folder with Qwen 2, tied, as transformers writes it."""
    folder = tmp_path_factory.mktemp("qwen")
    model = make_model(FAMILIES["Qwen 2"])
    model.save_pretrained(folder)
    shutil.copy(tokenizer, folder)
    return folder, model


def change(folder: Path, copy: Path, **values) -> Path:
    """Copy a folder, with other values in its config.json; None takes a key away."""
    shutil.copytree(folder, copy)
    config = {**json.loads((folder / "config.json").read_text()), **values}
    write_json(copy / "config.json", {k: v for k, v in config.items() if v is not None})
    return copy


def test_tied_embeddings_are_one_array(qwen, tmp_path):
    folder, _ = qwen
    assert convert(folder, tmp_path / "mlx").returncode == 0
    assert params_json(tmp_path / "mlx")["tie_word_embeddings"] is True
    assert "output.weight" not in names_in(tmp_path / "mlx")
    assert convert(folder, tmp_path / "mlx", "-q", "--q-group-size", 32).returncode == 0
    names = names_in(tmp_path / "mlx")
    assert {"layers.0.attention.wq.bias", "layers.0.attention.wq.biases"} <= names
    assert "tok_embeddings.scales" not in names
    model, _ = lora.load_model(tmp_path / "mlx", mx.float32)
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]]))[0])).all()


def test_embeddings_are_tied_where_they_are_stored_so_or_said_to_be(qwen, tmp_path):
    """As transformers has it: of two that differ, both are used, whatever config.json says."""
    folder, model = qwen
    embedding = model.state_dict()["model.embed_tokens.weight"]
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    assert convert(folder, tmp_path / "expected").returncode == 0
    for says, head, tied in (
        (False, embedding, True),
        (True, embedding, True),
        (True, embedding + 1, False),
        (False, embedding + 1, False),
    ):
        copy = change(folder, tmp_path / f"{says}-{head is embedding}", tie_word_embeddings=says)
        stored = {**tensors, "lm_head.weight": head.clone()}
        safetensors.torch.save_file(stored, copy / "model.safetensors")
        assert convert(copy, tmp_path / "mlx").returncode == 0
        assert ("output.weight" not in names_in(tmp_path / "mlx")) == tied
        if tied:
            assert contents(tmp_path / "mlx") == contents(tmp_path / "expected")
    lacks = change(folder, tmp_path / "lacks", tie_word_embeddings=False)
    assert "the checkpoint lacks output.weight" in convert(lacks, tmp_path / "none").stderr


def test_mistrals_repository_with_both_layouts_is_one_model(tokenizer, tmp_path):
    family = FAMILIES["Mistral 7B v0.3"]
    model = make_model(family._replace(config={**family.config, "max_position_embeddings": 8000}))
    write_release(tmp_path / "both", model, family.params)
    model.save_pretrained(tmp_path / "both")
    shutil.copy(tokenizer, tmp_path / "both")
    shutil.copytree(tmp_path / "both", tmp_path / "one")
    (tmp_path / "one" / "consolidated.safetensors").unlink()
    for name in ("both", "one"):
        assert convert(tmp_path / name, tmp_path / "mlx" / name).returncode == 0
    assert contents(tmp_path / "mlx" / "both") == contents(tmp_path / "mlx" / "one")


def test_rows_of_biases_and_norms_are_permuted_as_those_of_weights():
    ids = np.arange(16.0)
    for n_heads, expected in ((1, [0, 8, 1, 9]), (2, [0, 4, 1, 5]), (4, [0, 2, 1, 3])):
        stored = LazyTensor((16,), "float64", lambda: iter([ids]))
        assert permute(stored, n_heads).read()[:4].tolist() == expected
        rows = LazyTensor((16, 1), "float64", lambda: iter([ids[:8, None], ids[8:, None]]))
        permuted = permute(rows, n_heads).read()[:, 0]
        np.testing.assert_array_equal(permuted, permute(stored, n_heads).read())


# -------------------------------------------------------------------------------------------------
# What stands beside a tokenizer


def write_with_tokenizer(folder: Path, config: dict, tokenizer: Path, **beside: dict) -> Path:
    """Write a Mistral, which wants to end with token 32000 if it has one, and its tokenizer."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = make_model(Family("Mistral", {**shape, **config}))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[32000:32001, 0] = 8
        model.model.norm.weight.fill_(1)
    model.save_pretrained(folder)
    shutil.copy(tokenizer, folder / "tokenizer.model")
    for name, content in beside.items():
        write_json(folder / f"{name}.json", content)
    return folder


def test_the_added_end_token_of_a_chat_model_ends_its_text(tmp_path):
    """ChatML's tokens, added to Mistral's 32,000, as OpenHermes and others have them."""
    added = {"<|im_end|>": 32000, "<|im_start|>": 32001}
    config = {"vocab_size": 32002, "eos_token_id": 32000}
    folder = write_with_tokenizer(tmp_path / "in", config, MISTRAL_TOKENIZER, added_tokens=added)
    assert convert(folder, tmp_path / "mlx").stderr == ""
    assert contents(tmp_path / "mlx").keys() == {
        "weights.npz", "params.json", "tokenizer.model", "added_tokens.json"
    }  # fmt: skip
    assert params_json(tmp_path / "mlx")["eos_ids"] == [32000]
    flags = "--no-adapter", "--temp", 0, "-n", 5, "-p", "<|im_start|>user\nHi<|im_end|>\n"
    process = call_script("lora.py", "--model", tmp_path / "mlx", "--special-tokens", *flags)
    assert process.stdout.endswith("Generating\n<|im_start|>user\nHi<|im_end|>\n\n")


def test_a_tokenizer_that_adds_no_beginning_keeps_to_it(tmp_path):
    """As Yi's."""
    config = {"vocab_size": 32000}
    adds = {"add_bos_token": False}
    folder = write_with_tokenizer(tmp_path / "in", config, MISTRAL_TOKENIZER, tokenizer_config=adds)
    assert convert(folder, tmp_path / "mlx").returncode == 0
    assert params_json(tmp_path / "mlx")["bos_id"] is None
    _, tokenizer = lora.load_model(tmp_path / "mlx", mx.float32)
    assert len(tokenizer.encode("There is a place")) == 4


# -------------------------------------------------------------------------------------------------
# config.json


def values_of(kind: str, **config) -> dict:
    return params_of({**SHAPE, "model_type": kind, **config})


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_what_config_json_leaves_out_is_as_in_transformers(kind):
    defaults = getattr(transformers, f"{kind}Config")()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = params_of({"model_type": kind.lower(), **{k: getattr(defaults, k) for k in sizes}})
    assert values["norm_eps"] == defaults.rms_norm_eps
    assert values["max_position_embeddings"] == defaults.max_position_embeddings
    assert values.get("n_kv_heads", values["n_heads"]) == defaults.num_key_value_heads
    assert values.get("sliding_window") == getattr(defaults, "sliding_window", None)
    head_dim = getattr(defaults, "head_dim", None) or values["dim"] // values["n_heads"]
    assert values.get("head_dim", values["dim"] // values["n_heads"]) == head_dim
    assert values.get("rope_theta", ModelArgs.rope_theta) == defaults.rope_parameters["rope_theta"]
    assert values.get("tie_word_embeddings", False) == defaults.tie_word_embeddings


@pytest.mark.parametrize(
    ("kind", "config", "window"),
    [
        ("mistral", {"sliding_window": 512}, 512),
        ("mistral", {"sliding_window": None}, None),
        ("llama", {"sliding_window": 512}, None),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": False}, None),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": True}, None),  # from layer 28 on
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, None),
        ("ministral", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2}, 8),
        ("ministral", {"sliding_window": 8, "layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_the_window_is_the_one_that_transformers_applies(kind, config, window):
    assert values_of(kind, **config).get("sliding_window") == window
    name = kind.capitalize()
    theirs = getattr(transformers, f"{name}Config")(**{**SHAPE, **config})
    sliding = kind in ("qwen2", "qwen3", "ministral")
    uses = set(theirs.layer_types) == {"sliding_attention"} if sliding else kind == "mistral"
    assert (theirs.sliding_window if uses else None) == window


def test_equal_scalings_are_spelled_alike():
    old = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}
    new = {"factor": 4.0, "rope_type": "yarn", "rope_theta": 1e6}
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    for config in (
        {"rope_scaling": old, "rope_theta": 1e6, "max_position_embeddings": 131072},
        {"rope_parameters": new, "max_position_embeddings": 32768},
    ):
        values = values_of("qwen2", **config)
        assert json.dumps(values["rope_scaling"]) == json.dumps(expected)
        assert values["rope_theta"] == 1e6
    for nothing in ({"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}):
        assert "rope_scaling" not in values_of("llama", **nothing)


GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
MIXED = {"sliding_window": 8, "use_sliding_window": True, "layer_types": None}
MIXED["max_window_layers"] = 1


@pytest.mark.parametrize(
    ("change", "says", "instead"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "Mixtral", "Mistral 7B"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "Qwen's mixture of experts", "Qwen3-8B"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "DeepSeek V2, V3", "R1-Distill"),
        ({"model_type": "olmoe", "num_experts": 64}, "a mixture of experts (olmoe)", "Llama"),
        ({"model_type": "gpt_oss"}, "GPT-OSS", "a Llama"),
        ({"model_type": "gemma3_text"}, "Gemma", "a Llama"),
        ({"model_type": "phi3"}, "Phi", "a Llama"),
        ({"model_type": "llama4_text"}, "Llama 4", "Llama 3.1"),
        ({"model_type": "mllama", "text_config": {}}, "Llama 3.2 Vision", "Llama 3.1 8B"),
        ({"model_type": "qwen2_5_vl", "vision_config": {"depth": 1}}, "Qwen VL", "Qwen 2.5"),
        ({"model_type": "mistral3", "text_config": {"a": 1}}, "Mistral Small 3.1", "Small 3"),
        ({"model_type": "pixtral"}, "Pixtral", "Nemo"),
        ({"vision_config": {"depth": 1}}, "vision_config", "a Llama"),
        ({"quantization_config": {"quant_method": "fp8"}}, "(FP8)", "unquantized release"),
        (GPTQ, "(GPTQ)", "convert.py -q"),
        ({"quantization_config": {"quant_method": "awq"}}, "(AWQ)", "convert.py -q"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "(bitsandbytes)", "-q"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "(mlx-lm)", "convert.py -q"),
        (MIXED, "a sliding window in some layers and not in others", "a Llama"),
        ({"model_type": "llama", "attention_bias": True}, "a bias of o_proj", "a Llama"),
        ({"model_type": "llama", "mlp_bias": True}, "(mlp_bias)", "a Llama"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "of the kind dynamic", "a Llama"),
        ({"partial_rotary_factor": 0.5}, "RoPE of a part of each head", "a Llama"),
        ({"hidden_act": "gelu"}, "the activation gelu", "a Llama"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequence", "a Llama"),
    ],
)
def test_what_cannot_be_run_is_refused_by_its_name(qwen, tmp_path, change, says, instead):
    config = json.loads((qwen[0] / "config.json").read_text())
    with pytest.raises(ValueError, match="^config.json: ") as error:
        params_of({**config, **change})
    what, _, advice = str(error.value).partition(" is not supported: take ")
    assert says in what and instead in advice


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"moe": {"num_experts": 8}}, "a mixture of experts, such as Mixtral, (moe)"),
        ({"vision_encoder": {"hidden_size": 8}}, "such as Pixtral, (vision_encoder)"),
        ({"vision_chunk_size": 560}, "Llama 3.2 Vision"),
        ({"moe_args": {"num_experts": 16}}, "Llama 4"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantized already"),
        ({"llama_4_scaling": {"beta": 0.1}}, "(llama_4_scaling)"),
        ({"sliding_window": [131072, 32768, 32768, 32768]}, "as in Ministral 8B"),
        ({"model_type": "mamba"}, "the architecture mamba"),
    ],
)
def test_what_params_json_says_and_cannot_be_run_is_refused(tokenizer, tmp_path, params, says):
    write_release(tmp_path / "in", make_model(FAMILIES["Mistral 7B v0.3"]), {**MISTRAL, **params})
    process = convert(tmp_path / "in", tmp_path / "mlx")
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1
    assert says in process.stderr and "is not supported: take" in process.stderr
    assert not (tmp_path / "mlx").exists()


def test_mistrals_yarn_is_read():
    from parts.params_json import params_of as of_params

    yarn = {"factor": 8.0, "original_max_position_embeddings": 8192, "beta": 32.0, "alpha": 1.0}
    values = of_params({**MISTRAL, "yarn": {**yarn, "apply_scale": False}}, False, Path("p"))
    assert values["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.0,
    }


@pytest.mark.parametrize(
    ("suffix", "by"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("weight_scale_inv", "FP8"),
        ("scales", "mlx-lm"),
        ("SCB", "bits"),
    ],
)
def test_quantized_tensors_are_refused_whatever_config_json_says(qwen, tmp_path, suffix, by):
    folder = change(qwen[0], tmp_path / "in")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors[f"model.layers.0.mlp.up_proj.{suffix}"] = torch.ones(4)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    process = convert(folder, tmp_path / "mlx")
    assert process.returncode == 2
    assert by in process.stderr and "unquantized release" in process.stderr
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_hidden_layers": "3"}, "n_layers is '3', not a positive int"),
        ({"rope_parameters": "linear"}, "'linear' does not describe RoPE"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "8"}}, "factor of rope_scaling"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
        ({"num_key_value_heads": 3}, "n_heads 4 is no multiple of n_kv_heads"),
        ({"sliding_window": [8], "use_sliding_window": True, "max_window_layers": 0}, "[8]"),
    ],
)
def test_a_config_json_that_makes_no_sense_is_one_line(qwen, tmp_path, values, says):
    folder = change(qwen[0], tmp_path / "in", layer_types=None, **values)
    process = convert(folder, tmp_path / "mlx")
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert "config.json: " in process.stderr and says in process.stderr
    assert not (tmp_path / "mlx").exists()


def test_what_is_refused_need_not_be_downloaded(tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "mixtral"})
    (tmp_path / "model-00001-of-00019.safetensors").write_bytes(b"")
    assert "Mixtral, a mixture of experts," in convert(tmp_path, tmp_path / "mlx").stderr


def test_an_adapter_or_a_gguf_file_in_a_models_place_is_named(tmp_path):
    (tmp_path / "adapter").mkdir()
    write_json(tmp_path / "adapter" / "adapter_config.json", {"peft_type": "LORA"})
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    for name, says in (("adapter", "holds an adapter, no model"), ("gguf", "is a GGUF file")):
        process = convert(tmp_path / name, tmp_path / "mlx")
        assert process.returncode == 2
        assert says in process.stderr


# -------------------------------------------------------------------------------------------------
# The folder


def write_json_tokenizer(folder: Path) -> None:
    """Write a tokenizer.json of a thousand words, and a chat template."""
    words = {"<s>": 1, "</s>": 2, "<unk>": 0, **{f"word{i}": i for i in range(3, 1000)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = WordPiece()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def test_a_folder_that_is_converted_again_has_one_models_files(qwen, tmp_path):
    folder = change(qwen[0], tmp_path / "in")
    assert convert(folder, tmp_path / "mlx").returncode == 0
    first = contents(tmp_path / "mlx")
    (tmp_path / "mlx" / "notes.txt").write_text("mine")
    (folder / "tokenizer.model").unlink()
    write_json_tokenizer(folder)
    process = convert(folder, tmp_path / "mlx")
    assert process.returncode == 0, process.stderr
    second = contents(tmp_path / "mlx")
    assert second.keys() == {
        "weights.npz", "params.json", "tokenizer.json", "chat_template.jinja", "notes.txt"
    }  # fmt: skip
    assert second["chat_template.jinja"] == b"{{ messages }}"
    assert convert(qwen[0], tmp_path / "mlx").returncode == 0
    assert contents(tmp_path / "mlx") == {**first, "notes.txt": b"mine"}


def test_what_an_earlier_version_did_not_make_is_not_replaced(qwen, tmp_path):
    """It wrote tokenizer.model and no ids: a chat template there is its owner's."""
    assert convert(qwen[0], tmp_path / "mlx").returncode == 0
    params = params_json(tmp_path / "mlx")
    del params["bos_id"], params["eos_ids"]
    write_json(tmp_path / "mlx" / "params.json", params)
    assert convert(qwen[0], tmp_path / "mlx").returncode == 0
    write_json(tmp_path / "mlx" / "params.json", params)
    (tmp_path / "mlx" / "chat_template.jinja").write_text("mine")
    before = contents(tmp_path / "mlx")
    process = convert(qwen[0], tmp_path / "mlx")
    assert "holds a chat_template.jinja that convert.py did not make" in process.stderr
    assert contents(tmp_path / "mlx") == before


def test_a_folder_of_an_earlier_version_loads(tokenizer, tmp_path):
    shape = {**MISTRAL, "rope_theta": 10000.0}
    model = Model(ModelArgs(**shape))
    arrays = dict(tree_flatten(model.parameters()))
    np.savez(tmp_path / "weights.npz", **{k: np.array(v) for k, v in arrays.items()})
    write_json(tmp_path / "params.json", shape)
    shutil.copy(tokenizer, tmp_path)
    loaded, reader = lora.load_model(tmp_path, mx.float32)
    assert reader.encode("a")[0] == 1 and reader.eos_id == 2
    tokens = mx.array([[1, 5, 9]])
    np.testing.assert_array_equal(loaded(tokens)[0], model(tokens)[0])


def test_a_tokenizer_with_fewer_tokens_than_the_model_has_is_warned_of(qwen, tmp_path):
    model = make_model(FAMILIES["Qwen 2"]._replace(config={"vocab_size": 1024}))
    model.save_pretrained(tmp_path / "in")
    shutil.copy(qwen[0] / "tokenizer.model", tmp_path / "in")
    process = convert(tmp_path / "in", tmp_path / "mlx")
    assert process.returncode == 0
    assert "warning: the model has 1024 tokens and" in process.stderr
    assert "tokenizer.model 1000" in process.stderr
