"""SentencePiece tokenizers and their stream of text, against a reader of Mistral's own."""

import pytest
from conftest import MISTRAL_TOKENIZER
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from parts.tokenizers import Tokenizer, stream_text

TOKENIZER = Tokenizer(MISTRAL_TOKENIZER)


@pytest.mark.parametrize(
    "text",
    [
        "Simply maximum(x, 0).",
        "  two spaces before, one after ",
        "def f(x):\n    return x ** 2\n\n\tassert f(3) == 9",
        "你好，世界",
        "naïve café 🦙👩‍👩‍👧 \N{SNOWMAN}",
        "<s> is text here, </s> too",
        "",
    ],
)
def test_token_ids_equal_mistrals_own_reader(text):
    theirs = SentencePieceTokenizer(MISTRAL_TOKENIZER)
    assert TOKENIZER.encode(text) == theirs.encode(text, bos=True, eos=False)
    assert TOKENIZER.encode(text, eos=True) == theirs.encode(text, bos=True, eos=True)
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert (TOKENIZER.eos_id, TOKENIZER.vocab_size) == (theirs.eos_id, theirs.n_words)


@given(st.text(), st.text(), st.sampled_from([1, 2, 3, 7]))
def test_streamed_text_is_what_decoding_all_at_once_gives(prompt, text, every):
    prompt_ids = TOKENIZER.encode(prompt)
    ids = TOKENIZER.encode(text)[1:]
    pieces = list(stream_text(iter(ids), TOKENIZER, prompt_ids, every))
    whole = TOKENIZER.decode(prompt_ids + ids)
    assert TOKENIZER.decode(prompt_ids) + "".join(pieces) == whole
    assert len(pieces) <= len(ids) // every + 1


@given(st.lists(st.integers(3, 31999), max_size=40), st.sampled_from([1, 3, 7]))
def test_any_ids_stream_to_what_decoding_them_all_at_once_gives(ids, every):
    prompt_ids = TOKENIZER.encode("Q: a?\nA:")
    pieces = stream_text(iter(ids), TOKENIZER, prompt_ids, every)
    assert "Q: a?\nA:" + "".join(pieces) == TOKENIZER.decode(prompt_ids + ids)
