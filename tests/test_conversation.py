"""Conversations: what the model reads and answers, its cache from turn to turn, and how they look
on a terminal and in a pipe.
"""

from itertools import islice

import chat_templates
import numpy as np
import pytest
from conftest import QUICK, call_script, write_model
from test_chat import folder as tokenizer_folder  # noqa: F401  a fixture

from parts import decoder  # before MLX, for its BLAS
from parts.chat import BUILT_IN, ChatTemplate, end_of_turn
from parts.conversation import Conversation
from parts.decoder import generate_step, prefill
from parts.tokenizers import Tokenizer

import mlx.core as mx

import lora
from models import Model, ModelArgs

QUESTION = "What is a llama 🦙?"
ANSWER = "Bigly🦙!"  # of `chat_model` to anything
ENDLESS = "wxvz "  # its answer, again and again, where the system says ":"
# ChatML; what the system says is also the beginning of each answer.
TEMPLATE = BUILT_IN["chatml"].replace(
    "'<|im_start|>assistant\\n'",
    "'<|im_start|>assistant\\n' + (messages[0].content if messages[0].role == 'system' else '')",
)


@pytest.fixture(scope="module")
def chat_model(tokenizer_folder, tmp_path_factory):  # noqa: F811
    """The folder of a model whose next token is decided by the last, with little of the layers."""
    tokenizer = Tokenizer(tokenizer_folder / "tokenizer.json", 0, [1])
    mx.random.seed(5)
    size = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 100}
    model = Model(ModelArgs(**{**QUICK, **size}))
    for layer in model.layers:
        layer.attention.wo.weight = layer.attention.wo.weight * 0.2
        layer.feed_forward.w2.weight = layer.feed_forward.w2.weight * 0.2
    embedding = np.random.default_rng(0).normal(size=(tokenizer.vocab_size, 64))
    output = np.zeros_like(embedding)
    for text in (f"\n{ANSWER}<|im_end|>", f":{ENDLESS}w"):
        ids = tokenizer.encode(text, bos=False, special_tokens=True)
        assert len(set(ids[1:-1])) == len(ids) - 2
        for last, token in zip(ids, ids[1:], strict=False):
            output[token] += embedding[last]
    model.tok_embeddings.weight, model.output.weight = mx.array(embedding), mx.array(output)
    folder = write_model(tmp_path_factory.mktemp("chat"), model, **size, bos_id=None, eos_ids=[1])
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def arguments(*flags):
    return lora.build_parser().parse_args(["--temp", "0", *map(str, flags)])


def load(folder, *flags):
    """A conversation, its model and its tokenizer."""
    model, tokenizer = lora.load_model(folder, mx.float32)
    template = lora.load_template(None, folder, tokenizer)
    return Conversation(model, tokenizer, template, arguments(*flags)), model, tokenizer


def rendered(*contents):
    """The ChatML of a user and the assistant, who speaks next."""
    roles = ["user", "assistant"] * len(contents)
    texts = [f"<|im_start|>{r}\n{c}<|im_end|>\n" for r, c in zip(roles, contents, strict=False)]
    return "".join(texts) + "<|im_start|>assistant\n"


# -------------------------------------------------------------------------------------------------
# Answers


def test_a_prompt_is_a_users_message_and_the_end_of_a_turn_ends_the_answer(chat_model):
    process = call_script(
        "lora.py", "--model", chat_model, "--no-adapter", "--chat", "--prompt", QUESTION,
        "--temp", "0", "--dtype", "float32",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.partition("Generating\n")[2] == f"{ANSWER}\n"
    tokenizer = Tokenizer(chat_model / "tokenizer.json")
    n = len(tokenizer.encode(rendered(QUESTION), bos=False, special_tokens=True))
    n_answer = len(tokenizer.encode(f"{ANSWER}<|im_end|>", bos=False, special_tokens=True))
    assert f"Prompt: {n} tokens" in process.stderr
    assert f"generation: {n_answer} tokens" in process.stderr


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("SMOLLM2", "<|im_end|>"),
        ("LLAMA3", "<|eot_id|>"),
        ("LLAMA2", "</s>"),
        ("MISTRAL_V3", "</s>"),
        ("QWEN3", "<|im_end|>"),
    ],
)
def test_the_end_of_a_turn_is_what_real_templates_write(tokenizer_folder, name, end):  # noqa: F811
    tokenizer = Tokenizer(tokenizer_folder / "tokenizer.json", 0, [1])
    template = ChatTemplate(getattr(chat_templates, name), name, "<s>", "</s>")
    ids = tokenizer.encode(end, bos=False, special_tokens=True)
    assert end_of_turn(template, tokenizer) == (frozenset(ids), ())
    assert len(ids) == 1


def test_the_end_of_a_turn_is_text_where_no_token_stands_for_it(tiny_model):
    tokenizer = Tokenizer(tiny_model / "tokenizer.model")
    template = ChatTemplate(BUILT_IN["chatml"], "chatml", "", "")
    assert end_of_turn(template, tokenizer) == (frozenset(), ("<|im_end|>",))
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    assert end_of_turn(ChatTemplate(plain, "t", "", ""), tokenizer) == (frozenset(), ())


def test_a_model_without_a_template_says_what_to_give(tiny_model, data):
    process = call_script("lora.py", "--model", tiny_model, "--no-adapter", "--chat", "-p", "hi")
    assert process.returncode == 2
    assert "has no chat_template.jinja, which chats need: give --chat-template" in process.stderr


# -------------------------------------------------------------------------------------------------
# Turns


def assert_caches_hold(conversation, model, ids):
    """Those of a whole text, computed at once."""
    assert conversation._decoder.offset == len(ids)
    for ours, theirs in zip(conversation._decoder.caches, prefill(model, ids), strict=True):
        for a, b in zip(ours.filled(), theirs.filled(), strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-5)


def test_three_turns_are_what_the_whole_chat_at_once_is(chat_model, monkeypatch):
    """The tokens, the cache, and that no more is computed than is new."""
    conversation, model, tokenizer = load(chat_model)
    lengths, prefill = [], decoder.prefill

    def counted(model, ids, *caches):
        lengths.append(len(ids))
        return prefill(model, ids, *caches)

    said = []
    for question in (QUESTION, "And a vicuña?", "你好 😀"):
        ids = tokenizer.encode(rendered(*said, question), bos=False, special_tokens=True)
        monkeypatch.setattr(decoder, "prefill", counted)
        answer = "".join(conversation.ask(question))
        monkeypatch.undo()
        expected = list(islice(generate_step(model, ids), len(conversation._ids) - len(ids)))
        assert conversation._ids == [*ids, *expected]
        assert answer == tokenizer.decode(expected) == ANSWER
        assert_caches_hold(conversation, model, [*ids, *expected])
        said += [question, answer]
    assert [m["content"] for m in conversation.messages] == said
    texts = [rendered(QUESTION), f"\n{rendered('And a vicuña?')}", f"\n{rendered('你好 😀')}"]
    new = [len(tokenizer.encode(text, bos=False, special_tokens=True)) - 1 for text in texts]
    assert lengths == new
