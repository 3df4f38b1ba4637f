"""Each kind of tokenizer and its stream of text, against a reader of its own.

tests/benchmarks/tokenizer_ids.py compares far more texts.
"""

import inspect
import json
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import chat_templates
import numpy as np
import pytest
import transformers
from conftest import MISTRAL_TOKENIZER
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models.datatypes import RawMessage, StopReason
from llama_models.llama3.chat_format import ChatFormat
from llama_models.llama3.tokenizer import Tokenizer as MetasTokenizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from parts.byte_level_bpe import byte_letters, llama3_tokenizer, tekken_tokenizer, tokenizer_json
from parts.chat import ChatTemplate
from parts.records import Chat
from parts.token_rows import special_token_warning
from parts.tokenizers import Tokenizer, any_of, load_tokenizer, stream_text

TOKENIZER = Tokenizer(MISTRAL_TOKENIZER)
MISTRAL = MISTRAL_TOKENIZER.parent
PIECES = {
    "v1": MISTRAL_TOKENIZER,
    "v2": MISTRAL / "mistral_instruct_tokenizer_240216.model.v2",
    "v3": MISTRAL / "mistral_instruct_tokenizer_240323.model.v3",
    "v7": MISTRAL / "mistral_instruct_tokenizer_241114.model.v7",
}
LLAMA3 = Path(inspect.getfile(MetasTokenizer)).with_name("tokenizer.model")
KINDS = [*PIECES, "llama3", "tekken", "json"]
TEXTS = [
    "Simply maximum(x, 0).",
    "  two spaces before, one after ",
    "def f(x):\n    return x ** 2\n\n\tassert f(3) == 9",
    "你好，世界",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣",
    "naïve café 🦙👩‍👩‍👧 \N{SNOWMAN}",
    "<s> is text here, </s> too, <unk>[INST] [/INST]<|eot_id|><|begin_of_text|>",
    "WE'LL I've they'\N{LATIN SMALL LETTER LONG S}  \n\n \r\n\t\t 1 22 333 4444 55555",
    " " * 200 + "\n" * 50 + "ab" * 100 + "7" * 40,
    "\x00\x7f\x85\u200b\u3000\ufeff\ufffd\uffff\U0010ffff",
    "",
]


class Reader(NamedTuple):
    """Our tokenizer, and the ids of a text by a reader of its own, BOS first."""

    ours: Tokenizer
    encode: callable


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def llama3(folder) -> Reader:
    path = folder / "llama3" / "tokenizer.json"
    path.parent.mkdir()
    path.write_bytes(llama3_tokenizer(LLAMA3))
    theirs = MetasTokenizer(LLAMA3)
    return Reader(Tokenizer(path), lambda s, **kw: theirs.encode(s, bos=True, eos=False, **kw))


@pytest.fixture(scope="module")
def tekken(folder) -> Reader:
    path = folder / "tekken" / "tokenizer.json"
    path.parent.mkdir()
    path.write_bytes(tekken_tokenizer(MISTRAL / "tekken_240911.json"))
    theirs = Tekkenizer.from_file(MISTRAL / "tekken_240911.json")
    return Reader(Tokenizer(path), lambda s: theirs.encode(s, True, False))


@pytest.fixture(scope="module")
def hugging_face(folder) -> Reader:
    """The tokenizer.json that transformers makes of Mistral's pieces."""
    source = folder / "source"
    source.mkdir()
    shutil.copy(PIECES["v3"], source / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>"}
    config |= {"eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "config.json").write_text('{"model_type": "mistral"}')
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    theirs.save_pretrained(folder / "json")
    return Reader(
        Tokenizer(folder / "json" / "tokenizer.json"),
        lambda s, split_special_tokens=True: theirs.encode(
            s, split_special_tokens=split_special_tokens
        ),
    )


@pytest.fixture(params=KINDS)
def reader(request, llama3, tekken, hugging_face) -> Reader:
    made = {"llama3": llama3, "tekken": tekken, "json": hugging_face}
    if request.param in made:
        return made[request.param]
    theirs = SentencePieceTokenizer(PIECES[request.param])
    return Reader(Tokenizer(PIECES[request.param]), lambda s: theirs.encode(s, True, False))


# -------------------------------------------------------------------------------------------------
# Ids and text


def test_ids_are_those_of_the_formats_own_reader(reader):
    docs = sorted({inspect.getdoc(value) or "" for value in vars(np).values()})
    for text in [*TEXTS, *docs[::8], Path(inspect.__file__).read_text("utf-8")[:20000]]:
        ids = reader.ours.encode(text)
        assert ids == reader.encode(text)
        assert reader.ours.encode(text, eos=True) == [*ids, reader.ours.eos_id]
        assert set(ids[1:]).isdisjoint({reader.ours.bos_id, *reader.ours.eos_ids})


@settings(max_examples=60)
@given(st.data())
def test_any_text_has_the_ids_of_the_formats_own_reader(llama3, tekken, data):
    text = data.draw(st.text())
    for reader in (llama3, tekken):
        ids = reader.ours.encode(text)
        assert ids == reader.encode(text)
        assert reader.ours.decode(ids) == text


def test_decoding_gives_the_text_again(reader, hugging_face):
    for text in TEXTS[:-2] + [""]:
        if reader is hugging_face:  # its file takes a space at the beginning for its own
            text = text.lstrip(" ")
        assert reader.ours.decode(reader.ours.encode(text)) == text


def test_the_numbers_of_tokens_and_the_end_are_the_formats_own():
    theirs = SentencePieceTokenizer(MISTRAL_TOKENIZER)
    assert (TOKENIZER.eos_id, TOKENIZER.vocab_size) == (theirs.eos_id, theirs.n_words)


@pytest.mark.parametrize("kind", ["llama3"])
def test_a_tokenizer_can_be_pickled(kind, request):
    ours = request.getfixturevalue(kind).ours
    assert pickle.loads(pickle.dumps(ours)).encode("a b </s>") == ours.encode("a b </s>")


# -------------------------------------------------------------------------------------------------
# Special tokens


def test_special_tokens_of_llama_3_are_read_as_metas_reader_reads_them(llama3):
    read = partial(llama3.ours.encode, special_tokens=True)
    for names in (("<|eot_id|>", "<|begin_of_text|>"), ("<|eom_id|>", "\n")):
        for text in ("{0}", "a{0}b", "x {0}\n{1} y", "{0}{1}{0}", " {1} {0} 12"):
            text = "x" + text.format(*names)
            assert read(text) == llama3.encode(text, allowed_special="all")
            assert llama3.ours.encode(text) == llama3.encode(text)
    # A text that names its beginning and end gets no second ones; the end of a training's comes.
    text = "<|begin_of_text|>Hi<|end_of_text|>"
    assert read(text, eos=True) == [128000, 13347, 128001]
    assert read("Hi<|eot_id|>", eos=True) == [128000, 13347, 128009, 128001]
    assert llama3.ours.decode(read(text + "<|eot_id|>")) == "Hi"


@pytest.mark.parametrize("name", ["llama3", "tekken"])
def test_ids_of_chats_are_those_of_the_formats_own_reader(llama3, tekken, name):
    """Meta's of dialogs, and Mistral's of requests, which know of no templates."""
    contents = "Be brief.", "hi 😀 there", "yo  Ärger\n\nb", "more"
    roles = "system", "user", "assistant", "user"
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    if name == "llama3":
        ours, source = llama3.ours, chat_templates.LLAMA3
        dialogs = ChatFormat(MetasTokenizer(LLAMA3))
        said = [RawMessage(stop_reason=StopReason.end_of_turn, **m) for m in messages]
        expected = [dialogs.encode_dialog_prompt(said[first:]).tokens for first in (0, 3)]
    else:
        ours, source = tekken.ours, chat_templates.TEKKEN
        theirs = MistralTokenizer.from_file(str(MISTRAL / "tekken_240911.json"))
        requests = [ChatCompletionRequest(messages=messages[first:]) for first in (0, 3)]
        expected = [theirs.encode_chat_completion(request).tokens for request in requests]
    template = ChatTemplate(source, name, *map(ours.name_of, (ours.bos_id, ours.eos_id)))
    texts = [template.render(Chat(messages[first:], None), True).text for first in (0, 3)]
    assert ours.encode_batch(texts, bos=False, special_tokens=True) == expected


def test_special_tokens_of_a_tokenizer_json_are_read_as_transformers_reads_them(hugging_face):
    ours = Tokenizer(hugging_face.ours.path, 1, [2], special_tokens=True)
    for text in ("[INST] Hi [/INST]", "a</s> b", "x[INST]\n\n[/INST] y", "[TOOL_CALLS]</s>"):
        assert ours.encode(text) == hugging_face.encode(text, split_special_tokens=False)


def test_a_space_next_to_a_control_token_of_mistrals_belongs_to_it():
    ours = Tokenizer(PIECES["v3"], special_tokens=True)
    assert ours.encode("[INST] Hi [/INST]") == [1, 3, 16127, 4]
    assert ours.encode("<s>[INST] Hi[/INST] Hi</s>", eos=True) == [1, 3, 16127, 4, 16127, 2]
    assert ours.encode("[INST]  Hi [/INST]") == [1, 3, *ours.encode(" Hi", bos=False), 4]
    assert len(Tokenizer(PIECES["v3"]).encode("[INST] Hi [/INST]")) == 9


CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def write_chatml(folder: Path, **config) -> Path:
    """Mistral's pieces, with ChatML's tokens added, as Hugging Face's folders have them."""
    folder.mkdir(exist_ok=True)
    shutil.copy(MISTRAL_TOKENIZER, folder / "tokenizer.model")
    (folder / "added_tokens.json").write_text('{"<|im_end|>": 32000, "<|im_start|>": 32001}')
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    tokens = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|im_start|>"]
    ids = [0, 1, 2, 32000, 32001]
    flags = {i: {"content": t, "special": True} for i, t in zip(ids, tokens, strict=True)}
    content = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "unk_token": "<unk>"}
    content |= {"eos_token": "<|im_end|>", "add_bos_token": True, "added_tokens_decoder": flags}
    (folder / "tokenizer_config.json").write_text(json.dumps({**content, **config}))
    return folder


@pytest.mark.parametrize("legacy", [True, False])
def test_added_tokens_are_read_as_transformers_reads_them(tmp_path, legacy):
    folder = write_chatml(tmp_path / "chatml", legacy=legacy)
    ours = load_tokenizer(folder, 1, [32000], special_tokens=True)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (CHATML, "a<|im_end|>b", "Hi <|im_end|> there\n<|im_start|>", "<|im_end|>"):
        assert ours.encode(text) == theirs.encode(text)
    assert len(ours.encode(CHATML)) == 11
    assert ours.encode("<|im_end|>", special_tokens=False) == TOKENIZER.encode("<|im_end|>")
    assert ours.vocab_size == 32002
    assert ours.decode(ours.encode("Hi<|im_end|> you", bos=False)) in ("Hi you", "Hi  you")


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_flags_of_added_tokens_count(tmp_path, flag):
    token = {"content": "<sep>", "special": True, flag: True}
    folder = write_chatml(tmp_path / "flags", added_tokens_decoder={"32000": token})
    (folder / "added_tokens.json").unlink()
    ours = load_tokenizer(folder, 1, [2], special_tokens=True)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, eos_token="</s>")
    for text in ("a <sep> b", "a<sep>b", " <sep>\n<sep>  ", "<sep>"):
        assert ours.encode(text) == theirs.encode(text)


def test_added_words_that_are_not_special_are_always_tokens(tmp_path):
    token = {"content": "zebrafish", "special": False}
    folder = write_chatml(tmp_path / "words", added_tokens_decoder={"32000": token})
    (folder / "added_tokens.json").unlink()
    ours = load_tokenizer(folder, 1, [2])
    assert 32000 in ours.encode("a zebrafish swims")
    assert "zebrafish" in ours.decode(ours.encode("a zebrafish swims"))
    assert ours.find_special("a zebrafish swims") is None
    # Unless one ends a text.
    assert 32000 not in load_tokenizer(folder, 1, [32000]).encode("a zebrafish swims")


def test_a_piece_of_text_that_ends_texts_stays_one(llama3):
    """As where config.json has the number that other models' ends have."""
    ours = Tokenizer(llama3.ours.path, 128000, [128001, 2])
    assert ours.eos_ids == {128001, 2}
    assert ours.encode("# a #") == llama3.encode("# a #")
    assert ours.decode(ours.encode("# a #")) == "# a #"


def test_texts_that_name_special_tokens_are_warned_of_once(tmp_path):
    texts = [("plain", "a.jsonl, line 1"), ("x</s>", "a.jsonl, line 3"), ("<s>", "b.jsonl, line 1")]
    warning = special_token_warning(texts, TOKENIZER)
    assert warning.startswith("2 texts name special tokens, such as </s> (a.jsonl, line 3)")
    assert "--special-tokens" in warning
    assert special_token_warning(texts[:1], TOKENIZER) is None
    reading = Tokenizer(MISTRAL_TOKENIZER, special_tokens=True)
    assert special_token_warning(texts, reading) is None


# -------------------------------------------------------------------------------------------------
# Streams


@given(st.text(), st.text(), st.sampled_from([1, 2, 3, 7]))
def test_streamed_text_is_what_decoding_all_at_once_gives(prompt, text, every):
    prompt_ids = TOKENIZER.encode(prompt)
    ids = TOKENIZER.encode(text)[1:]
    pieces = list(stream_text(iter(ids), TOKENIZER, prompt_ids, every))
    whole = TOKENIZER.decode(prompt_ids + ids)
    assert TOKENIZER.decode(prompt_ids) + "".join(pieces) == whole
    assert len(pieces) <= len(ids) // every + 1


@settings(max_examples=40)
@given(st.data())
def test_any_ids_stream_to_what_decoding_them_all_at_once_gives(llama3, tekken, hugging_face, data):
    every = data.draw(st.sampled_from([1, 3, 7]))
    for tokenizer in (TOKENIZER, llama3.ours, tekken.ours, hugging_face.ours):
        # Many bytes alone, of which most are parts of characters; and special tokens.
        ids = st.integers(0, tokenizer.vocab_size - 1) | st.integers(3, 260)
        ids = data.draw(st.lists(ids, max_size=30))
        prompt_ids = tokenizer.encode("Q: a?\nA:")
        pieces = stream_text(iter(ids), tokenizer, prompt_ids, every)
        assert "Q: a?\nA:" + "".join(pieces) == tokenizer.decode(prompt_ids + ids)


def test_a_character_of_several_tokens_is_streamed_whole_and_at_once(llama3):
    ids = llama3.ours.encode("🦙 b", bos=False)
    assert len(ids) > 2
    pieces = list(stream_text(iter(ids), llama3.ours, llama3.ours.encode("a")))
    assert [piece for piece in pieces if piece] == ["🦙", " b"]


# -------------------------------------------------------------------------------------------------
# Byte-level BPE from ranks


def bytes_and(*tokens: bytes) -> list[bytes]:
    return [bytes([i]) for i in range(256)] + list(tokens)


def test_a_token_that_no_merges_of_lower_ranks_make_is_found_all_the_same(tmp_path):
    """`abc` needs `bc`, which comes after it; and a word that is a token is that token."""
    path = tmp_path / "tokenizer.json"
    tokens = bytes_and(b"abc", b"bc", b"xyz")
    path.write_bytes(tokenizer_json(tokens, 0, {259: "<end>"}, r"\w+|\W+", None))
    ours = Tokenizer(path, None, [259])
    assert ours.encode("aabc bc xyz xyzz") == [97, 256, 32, 257, 32, 258, 32, 120, 121, 122, 122]


def test_every_byte_has_a_letter_of_its_own():
    letters = byte_letters()
    assert len(set(letters.values())) == 256
    assert [letters[i] for i in b" \n!a\xad"] == [0x120, 0x10A, 33, 97, 0x143]


@given(st.lists(st.text("<ab[/>", min_size=1, max_size=6), max_size=9), st.text("<ab[/>"))
def test_of_names_that_begin_alike_the_longest_is_found(names, text):
    starts = ((i, name) for i in range(len(text)) for name in names if text.startswith(name, i))
    expected = min(starts, key=lambda found: (found[0], -len(found[1])), default=(None, None))[1]
    match = any_of(names).search(text)
    assert (match and match[0]) == expected
