"""Which tokenizer of a checkpoint's folder is taken, and what begins and ends its texts."""

import base64
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import transformers
from conftest import MISTRAL_TOKENIZER, QUICK, call_script, write_jsonl, write_quick_model
from mlx.utils import tree_flatten
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as HuggingFaces

from models import Model, ModelArgs
from parts.byte_level_bpe import LLAMA3_PATTERN, llama3_special, tokenizer_json
from parts.source_tokenizers import SourceTokenizer, read_source_tokenizer
from parts.tokenizers import Tokenizer, load_tokenizer

V3 = MISTRAL_TOKENIZER.with_name("mistral_instruct_tokenizer_240323.model.v3")
WORDS = [bytes([i]) for i in range(256)] + [b"ab", b"abc", b" a", b"<|"]
N = len(WORDS)
TEXTS = ["", "abc ab", " abc<|x|>\n\n", "<|eot_id|>", "12345 'S"]


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    return path


def write_tiktoken(folder: Path) -> None:
    lines = (f"{base64.b64encode(word).decode()} {i}\n" for i, word in enumerate(WORDS))
    (folder / "tokenizer.model").write_text("".join(lines))


def write_tekken(folder: Path, **content) -> None:
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
        for i, word in enumerate([*WORDS, b"more", b"than wanted"])
    ]
    config = {"pattern": LLAMA3_PATTERN, "default_vocab_size": N + 30}
    config["default_num_special_tokens"] = 30
    (folder / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab, **content}))


def write_json(folder: Path, bos: int | None = None, special: tuple = ("<s>", "</s>")) -> bytes:
    names = {N + i: name for i, name in enumerate(special)}
    content = tokenizer_json(WORDS, 0, names, LLAMA3_PATTERN, bos)
    (folder / "tokenizer.json").write_bytes(content)
    return content


def write_config(folder: Path, name: str = "tokenizer_config.json", **content) -> None:
    (folder / name).write_text(json.dumps(content))


def put(found: SourceTokenizer, folder: Path, **keywords) -> Tokenizer:
    """The tokenizer of a model's folder, as convert.py would write it."""
    folder.mkdir()
    for name, content in found.files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return load_tokenizer(folder, found.bos_id, found.eos_ids, **keywords)


# -------------------------------------------------------------------------------------------------
# Formats


@pytest.mark.parametrize("scaled", [True, False])
def test_llama_3s_file_becomes_a_tokenizer_json(folder, tmp_path, scaled):
    write_tiktoken(folder)
    write_config(folder, "params.json", use_scaled_rope=scaled)
    found = read_source_tokenizer(folder, N + 256)
    assert found.bos_id == N
    assert found.eos_ids == ([N + 1, N + 8, N + 9] if scaled else [N + 1, N + 9])
    assert (list(found.files), found.n_tokens) == (["tokenizer.json"], N + 256)
    ours = put(found, tmp_path / "mlx", special_tokens=True)
    assert ours.encode("abc<|eot_id|> abc") == [N, 257, N + 9, 32, 257]
    first = Tokenizer(ours.path).encode("<|begin_of_text|>")  # text, and nothing beside it
    assert first == [N, 259, *b"begin", *b"_", *b"of", *b"_", *b"text", *b"|>"]


def test_names_of_llama_3s_reserved_tokens():
    newer, older = llama3_special(True), llama3_special(False)
    assert len(set(newer)) == len(set(older)) == 256
    assert newer[4:6] == ["<|finetune_right_pad_id|>", "<|step_id|>"]
    assert newer[6:10] == ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
    assert [older[i][-5:] for i in (4, 5, 8, 10, 255)] == [
        "n_2|>",
        "n_3|>",
        "n_4|>",
        "n_5|>",
        "250|>",
    ]
    assert (older[6], older[9]) == ("<|start_header_id|>", "<|eot_id|>")


def test_tekkens_ids_follow_those_of_its_special_tokens(folder, tmp_path):
    write_tekken(folder)
    found = read_source_tokenizer(folder, N + 30)
    assert (found.bos_id, found.eos_ids, found.n_tokens) == (1, [2], N + 30)
    ours = put(found, tmp_path / "mlx", special_tokens=True)
    assert ours.encode("[INST]abc[/INST]<SPECIAL_29>") == [1, 3, 30 + 257, 4, 29]
    listed = [{"rank": i, "token_str": f"<t{i}>"} for i in (0, 1)] + [
        {"rank": 2, "token_str": "</s>"}
    ]
    write_tekken(folder, special_tokens=listed)
    ours = put(read_source_tokenizer(folder, N + 30), tmp_path / "other", special_tokens=True)
    assert ours.encode("<t0>[INST]", bos=False)[:2] == [0, 30 + ord("[")]


def test_equal_files_become_equal_bytes(folder):
    write_tekken(folder)
    files = [read_source_tokenizer(folder, N + 30).files for _ in range(2)]
    assert files[0]["tokenizer.json"] == files[1]["tokenizer.json"]


# -------------------------------------------------------------------------------------------------
# Which file


def test_a_sentencepiece_model_is_taken_before_a_tokenizer_json_that_agrees(folder):
    shutil.copy(V3, folder / "tokenizer.model")
    pieces = SentencePieceProcessor(model_file=str(V3))
    vocab = {pieces.id_to_piece(i): i for i in range(32768)}
    special = [AddedToken(pieces.id_to_piece(i), normalized=False) for i in range(3)]
    made = HuggingFaces(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoders.ByteFallback()
    made.add_special_tokens(special)
    made.save(str(folder / "tokenizer.json"))
    files = read_source_tokenizer(folder, 32768, {}).files
    assert list(files) == ["tokenizer.model"]
    # With tokens that have each other's ids, or with one more, the other is read.
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab["▁a"], vocab["▁the"] = vocab["▁the"], vocab["▁a"]
    path.write_text(json.dumps({**content, "model": {**content["model"], "vocab": vocab}}))
    assert list(read_source_tokenizer(folder, 32768, {}).files) == ["tokenizer.json"]
    content["added_tokens"].append({**content["added_tokens"][0], "id": 32768, "content": "<new>"})
    path.write_text(json.dumps(content))
    found = read_source_tokenizer(folder, 32769, {})
    assert (list(found.files), found.n_tokens) == (["tokenizer.json"], 32769)
    assert found.files["tokenizer.json"] == path


def test_of_two_sentencepiece_models_the_one_that_fits_is_taken(folder):
    shutil.copy(MISTRAL_TOKENIZER, folder / "tokenizer.model")
    assert read_source_tokenizer(folder, 32768).n_tokens == 32000
    shutil.copy(V3, folder / "tokenizer.model.v3")
    assert read_source_tokenizer(folder, 32768).files["tokenizer.model"].name.endswith(".v3")
    assert read_source_tokenizer(folder, 32000).files["tokenizer.model"].name == "tokenizer.model"


def test_tekkens_file_is_taken_before_a_tokenizer_json_of_other_names(folder):
    write_tekken(folder)
    made = read_source_tokenizer(folder, N + 30).files["tokenizer.json"]
    (folder / "tokenizer.json").write_bytes(made)
    assert read_source_tokenizer(folder, N + 30).source.name == "tekken.json"
    (folder / "tokenizer.json").write_bytes(made.replace(b"[INST]", b"[Inst]"))
    assert read_source_tokenizer(folder, N + 30).source.name == "tokenizer.json"


def test_tokens_that_only_tokenizer_config_has_are_added(folder, tmp_path):
    write_json(folder)
    tokens = {str(N + 2): {"content": "<|im_end|>", "special": True}}
    write_config(folder, eos_token="<|im_end|>", added_tokens_decoder=tokens)
    found = read_source_tokenizer(folder, N + 3, {})
    assert (found.n_tokens, found.eos_ids) == (N + 3, [N + 2])
    ours = put(found, tmp_path / "mlx", special_tokens=True)
    assert ours.encode("ab<|im_end|>") == [256, N + 2]


# -------------------------------------------------------------------------------------------------
# Beginning and ends


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("adds", [None, True, False])
def test_the_beginning_is_transformers(folder, tmp_path, begins, adds):
    write_json(folder, N if begins else None)
    config = {} if adds is None else {"add_bos_token": adds}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "TokenizersBackend"}
    write_config(folder, **config)
    write_config(folder, "config.json", model_type="llama")
    ours = put(read_source_tokenizer(folder, N + 2, {}), tmp_path / "mlx")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    assert (ours.bos_id is None) == (not begins)


def test_sentencepiece_models_begin_texts_unless_they_are_told_not_to(folder, tmp_path):
    shutil.copy(MISTRAL_TOKENIZER, folder / "tokenizer.model")
    assert read_source_tokenizer(folder, 64000).bos_id == 1
    write_config(folder, add_bos_token=False, bos_token="<s>", eos_token="</s>")
    ours = put(read_source_tokenizer(folder, 64000, {}), tmp_path / "yi")
    assert len(ours.encode("There is a place")) == 4
    assert ours.encode("There is a place", eos=True)[-1] == 2


def test_any_files_end_token_ends_a_text_and_the_tokenizers_own_one_of_a_training(folder):
    write_json(folder, special=("<s>", "</s>", "<a>", "<b>", "<c>"))
    write_config(folder, eos_token={"content": "<a>"})
    write_config(folder, "generation_config.json", eos_token_id=[N + 3, N + 1])
    found = read_source_tokenizer(folder, N + 5, {"eos_token_id": N + 4})
    assert found.eos_ids == [N + 2, N + 3, N + 1, N + 4]
    (folder / "tokenizer_config.json").unlink()
    found = read_source_tokenizer(folder, N + 5, {"eos_token_id": N + 4})
    assert found.eos_ids == [N + 3, N + 1, N + 4]
    (folder / "generation_config.json").unlink()
    assert read_source_tokenizer(folder, N + 5, {"eos_token_id": -1}).eos_ids == [N + 1]  # </s>


@pytest.mark.parametrize(
    "template",
    ["{{ x }}", [{"name": "tool", "template": "t"}, {"name": "default", "template": "{{ x }}"}]],
)
def test_the_chat_template_is_kept(folder, template):
    write_json(folder)
    write_config(folder, chat_template=template)
    assert read_source_tokenizer(folder, N + 2).files["chat_template.jinja"] == b"{{ x }}"
    (folder / "chat_template.jinja").write_text("{{ y }}")
    assert read_source_tokenizer(folder, N + 2).files["chat_template.jinja"].name


# -------------------------------------------------------------------------------------------------
# Mistakes


NO_DECODER = b"""{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}"""


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("tokenizer.model", b"", "tokenizer.model is empty"),
        ("tokenizer.json", b"", "tokenizer.json is empty"),
        ("tekken.json", b"", "tekken.json is empty"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        ("tekken.json", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        ("tokenizer.json", b'{"model": {"vocab": {}}}', "is no tokenizer of Hugging Face's"),
        ("tokenizer.json", b"{", "is not JSON"),
        ("tokenizer.json", NO_DECODER, "does not say how tokens become text"),
        ("tekken.json", b"{}", "is no tokenizer of Tekken"),
        ("tokenizer.model", b"\x0a\x05abcde", "is no SentencePiece model"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\nIw== 2\n", "lacks tokens of one byte"),
        ("tokenizer.model", b"IQ== 0\nIg== 2\n", "line 2 is out of order"),
        ("tokenizer.model", b"IQ== 0\n!\n", "line 2 is no token and its rank"),
        ("tokenizer.model", b"IQ== 0\nIQ== 1\n", "has a token twice"),
    ],
)
def test_a_damaged_file_is_one_line(folder, name, content, says):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        read_source_tokenizer(folder, 32000)
    assert str(folder / name) in str(error.value)


@pytest.mark.parametrize(
    "beside",
    [
        {"added_tokens.json": {"<y>": -1}},
        {"tokenizer_config.json": {"added_tokens_decoder": {str(N + 2): {"content": ["<y>"]}}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"-2": {"content": "<y>"}}}},
    ],
)
def test_malformed_added_tokens_are_one_line(folder, beside):
    write_json(folder)
    ((name, content),) = beside.items()
    write_config(folder, name, **content)
    with pytest.raises(ValueError, match="are malformed") as error:
        read_source_tokenizer(folder, 32000)
    assert str(folder / name) in str(error.value)


def test_ends_that_are_no_tokens_are_passed_over(folder):
    write_json(folder)
    write_config(
        folder, eos_token=["</s>"], bos_token={"content": {}}, chat_template=[{"name": []}]
    )
    write_config(folder, "generation_config.json", eos_token_id={})
    # The model has rows that the tokenizer has no tokens for.
    found = read_source_tokenizer(folder, N + 50, {"eos_token_id": [N + 30, True, [1], "x", N]})
    assert found.eos_ids == [N] and found.files.keys() == {"tokenizer.json"}


def test_a_beginning_that_is_no_token_is_one_line(folder):
    content = json.loads(write_json(folder, bos=N))
    content["post_processor"]["special_tokens"]["<s>"]["ids"] = [N + 30]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"begins a text with token {N + 30}"):
        read_source_tokenizer(folder, N + 50)


@pytest.mark.parametrize(
    "change, special",
    [
        ({"pattern": "("}, None),
        ({"default_num_special_tokens": 10**9, "default_vocab_size": 10**9 + N}, None),
        ({}, [{"rank": i, "token_str": "<x>"} for i in range(20)]),
        ({}, [{"rank": 0, "token_str": 5}]),
    ],
)
def test_a_tekken_file_that_makes_no_sense_is_one_line(folder, change, special):
    write_tekken(folder)
    content = json.loads((folder / "tekken.json").read_text())
    content["config"].update(change)
    content["special_tokens"] = special
    (folder / "tekken.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="download it"):
        read_source_tokenizer(folder, 32000)


def test_a_chat_template_that_is_none_is_one_line(folder):
    write_json(folder)
    write_config(folder, chat_template="\ud800")
    with pytest.raises(ValueError, match="hold half a character"):
        read_source_tokenizer(folder, 32000)
    (folder / "chat_template.jinja").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="git-lfs pointer"):
        read_source_tokenizer(folder, 32000)


def test_a_missing_tokenizer_is_one_line(folder):
    with pytest.raises(FileNotFoundError, match="copy the model's tokenizer there"):
        read_source_tokenizer(folder, 32000)


@pytest.mark.parametrize("write", [write_json, write_tekken, write_tiktoken])
def test_more_tokens_than_the_models_are_another_models(folder, write):
    write(folder)
    with pytest.raises(ValueError, match="tokens, the model 200: it is of another"):
        read_source_tokenizer(folder, 200)


# -------------------------------------------------------------------------------------------------
# In a run


@pytest.fixture(scope="module")
def ending_model(tmp_path_factory) -> Path:
    """A model that ends every text at once, with a token added to its tokenizer."""
    mx.random.seed(1)
    n_tokens = QUICK["vocab_size"] + 1
    model = Model(ModelArgs(**{**QUICK, "vocab_size": n_tokens}))
    weights = {name: np.array(value) * 0.01 for name, value in tree_flatten(model.parameters())}
    weights["tok_embeddings.weight"][:, 0] = 3
    weights["output.weight"][:] = 0
    weights["output.weight"][n_tokens - 1, 0] = 8
    weights |= {name: value * 0 + 1 for name, value in weights.items() if "norm" in name}
    model.load_weights([(name, mx.array(value)) for name, value in weights.items()])
    folder = tmp_path_factory.mktemp("ending")
    params = {"vocab_size": n_tokens, "bos_id": 1, "eos_ids": [n_tokens - 1]}
    write_quick_model(folder, model, **params)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": n_tokens - 1}))
    return folder


def test_generation_ends_at_an_added_token_which_is_not_shown(ending_model):
    flags = "--model", ending_model, "--no-adapter", "--temp", "0", "--prompt"
    process = call_script("lora.py", *flags, "Hi")
    assert process.stdout.endswith("Generating\nHi\n"), process.stderr
    assert "warning" not in process.stderr
    process = call_script("lora.py", *flags, "Hi<|im_end|>")
    assert "a text names special tokens, such as <|im_end|> (--prompt)" in process.stderr
    assert process.stdout.endswith("Generating\nHi<|im_end|>\n")


def test_texts_that_name_special_tokens_are_read_as_the_flag_says(ending_model, tmp_path):
    texts = ["plain", "<s>Hi</s>", "Hello<|im_end|>"]
    write_jsonl(tmp_path / "test.jsonl", texts)
    flags = "--model", ending_model, "--data", tmp_path, "--test", "--no-adapter"
    process = call_script("lora.py", *flags)
    place = f"{tmp_path / 'test.jsonl'}, line 2"
    assert f"2 texts name special tokens, such as <s> ({place}), which are" in process.stderr
    assert process.stderr.count("warning: 2 texts") == 1
    other = call_script("lora.py", *flags, "--special-tokens")
    assert "special" not in other.stderr
    assert other.stdout != process.stdout  # the losses are of other ids
    tokenizer = load_tokenizer(ending_model, 1, [QUICK["vocab_size"]], special_tokens=True)
    ids = [tokenizer.encode(text, eos=True) for text in texts]
    assert ids[1] == [1, *tokenizer.encode("Hi", bos=False), 2, QUICK["vocab_size"]]
    assert ids[2] == [1, *tokenizer.encode("Hello", bos=False), QUICK["vocab_size"]]
    assert (
        load_tokenizer(ending_model).encode("a", eos=True)[-1] == QUICK["vocab_size"]
    )  # params.json's


def test_where_no_token_begins_texts_what_is_none_is_one_line(ending_model, tmp_path):
    folder = shutil.copytree(ending_model, tmp_path / "model")
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, "bos_id": None}))
    flags = "--model", folder, "--no-adapter"
    process = call_script("lora.py", *flags, "--prompt", "")
    assert (process.returncode, "Generating" in process.stdout) == (2, False)
    assert "--prompt is empty" in process.stderr
    write_jsonl(tmp_path / "test.jsonl", ["a text", "<|im_end|>"])
    flags = *flags, "--test", "--data", tmp_path
    assert call_script("lora.py", *flags).returncode == 0
    process = call_script("lora.py", *flags, "--special-tokens")
    assert process.returncode == 2
    assert f"{tmp_path / 'test.jsonl'}, line 2 is one token" in process.stderr
