"""Conversations: what the model reads and answers, its cache from turn to turn, and how they look
on a terminal and in a pipe.
"""

import io
import json
import os
import pty
import re
import select
import shutil
import sys
import time
from itertools import islice

import chat_templates
import numpy as np
import pytest
from conftest import QUICK, ROOT, call_script, write_model
from test_chat import folder as tokenizer_folder  # noqa: F401  a fixture
from test_chat import said

from parts import decoder, kv_cache, talk  # before MLX, for its BLAS
from parts.chat import BUILT_IN, ChatTemplate, encode_prompt, end_of_turn, load_template
from parts.conversation import Conversation
from parts.decoder import Decoder, generate_step
from parts.kv_cache import KVCache
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
    template = load_template(None, folder, tokenizer)
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


@pytest.fixture
def model_without_weights(tiny_model, tmp_path):
    """What is found before these are read ends a run with another message than theirs."""
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "weights.npz").write_bytes(b"none")
    return tmp_path / "model"


def test_a_model_without_a_template_says_what_to_give(model_without_weights):
    flags = "--model", model_without_weights, "--no-adapter", "--chat", "-p", "hi"
    process = call_script("lora.py", *flags)
    assert process.returncode == 2
    assert "has no chat_template.jinja, which chats need: give --chat-template" in process.stderr


@pytest.mark.parametrize("source", ["{% if %}", "{{ raise_exception('no') }}"])
def test_a_template_that_does_not_work_is_found_before_the_weights_are_read(
    model_without_weights, source, tmp_path
):
    (tmp_path / "t.jinja").write_text(source)
    for name in ("test.jsonl", "prompts"):
        (tmp_path / name).write_text(json.dumps({"messages": said("a", "b")}))
    flags = (
        "--model",
        model_without_weights,
        "--no-adapter",
        "--chat-template",
        tmp_path / "t.jinja",
    )
    for what in (
        ["--chat", "-p", "hi"], ["--prompts", tmp_path / "prompts"], ["--test", "--data", tmp_path],
    ):  # fmt: skip
        process = call_script("lora.py", *flags, *what)
        assert process.returncode == 2
        assert "t.jinja does not work: " in process.stderr


# -------------------------------------------------------------------------------------------------
# Turns


def caches_of(model, ids):
    """Of a whole text, computed at once."""
    decode = Decoder(model)
    decode.prefill(ids)
    return decode.caches


def assert_caches_hold(conversation, model, ids):
    """Those of a whole text, computed at once."""
    assert conversation._decoder.offset == len(ids)
    for ours, theirs in zip(conversation._decoder.caches, caches_of(model, ids), strict=True):
        for a, b in zip(ours.filled(), theirs.filled(), strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-5)


def test_three_turns_are_what_the_whole_chat_at_once_is(chat_model, monkeypatch):
    """The tokens, the cache, and that no more is computed than is new."""
    conversation, model, tokenizer = load(chat_model)
    lengths, read_prompt = [], decoder.read_prompt

    def counted(model, ids, caches):
        lengths.append(len(ids))
        return read_prompt(model, ids, caches)

    so_far = []
    for question in (QUESTION, "And a vicuña?", "你好 😀"):
        ids = tokenizer.encode(rendered(*so_far, question), bos=False, special_tokens=True)
        monkeypatch.setattr(decoder, "read_prompt", counted)
        answer = "".join(conversation.ask(question))
        monkeypatch.undo()
        expected = list(islice(generate_step(model, ids), len(conversation._ids) - len(ids)))
        assert conversation._ids == [*ids, *expected]
        assert answer == tokenizer.decode(expected) == ANSWER
        assert_caches_hold(conversation, model, [*ids, *expected])
        so_far += [question, answer]
    assert conversation.messages == said(*so_far)
    texts = [rendered(QUESTION), f"\n{rendered('And a vicuña?')}", f"\n{rendered('你好 😀')}"]
    new = [len(tokenizer.encode(text, bos=False, special_tokens=True)) for text in texts]
    assert lengths == new


def test_an_answer_that_is_read_as_other_tokens_than_it_was_written_in_changes_nothing(tiny_model):
    """Of a random model, in pieces that no tokenizer makes of their text, and parts of letters."""
    model, tokenizer = lora.load_model(tiny_model, mx.float32)
    template = load_template("mistral", tiny_model, tokenizer)
    conversation = Conversation(model, tokenizer, template, arguments("-n", 12))
    was_read_otherwise = False
    for question in ("Hello", "你好 😀", "And?"):
        known = conversation._ids
        messages = [*conversation.messages, {"role": "user", "content": question}]
        ids = encode_prompt(template, tokenizer, messages)
        was_read_otherwise |= known != ids[: len(known)]
        answer = "".join(conversation.ask(question))
        written = conversation._ids[len(ids) :]
        assert written == list(islice(generate_step(model, ids), len(written)))
        assert answer == tokenizer.decode([*ids, *written])[len(tokenizer.decode(ids)) :]
        assert_caches_hold(conversation, model, [*ids, *written])
    assert was_read_otherwise


def test_what_was_said_before_an_interruption_stays_and_the_cache_with_it(chat_model):
    conversation, model, tokenizer = load(chat_model)
    pieces = []
    answer = "".join(pieces.append(p) or p for p in conversation.ask("a", lambda: len(pieces) > 2))
    assert ANSWER.startswith(answer) and 0 < len(answer) < len(ANSWER)
    assert [m["content"] for m in conversation.messages] == ["a", answer]
    assert_caches_hold(conversation, model, conversation._ids)
    assert "".join(conversation.ask("b", lambda: True)) == ""  # no word: no question
    assert "".join(conversation.ask("c")) == ANSWER
    assert [m["content"] for m in conversation.messages] == ["a", answer, "c", ANSWER]
    ids = tokenizer.encode(rendered("a", answer, "c"), bos=False, special_tokens=True)
    assert conversation._ids[: len(ids)] == ids
    assert_caches_hold(conversation, model, conversation._ids)


def test_an_error_amid_an_answer_costs_the_cache_and_nothing_else(chat_model):
    conversation, model, _ = load(chat_model)
    list(conversation.ask("a"))
    pieces = conversation.ask("b")
    next(pieces)
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)
    assert len(conversation.messages) == 2
    assert "".join(conversation.ask("c")) == ANSWER
    assert_caches_hold(conversation, model, conversation._ids)


def test_a_window_that_has_lost_what_a_turn_needs_is_computed_again(chat_model, monkeypatch):
    """What comes after a change in the first message is all new."""
    monkeypatch.setattr(kv_cache, "STEP", 16)
    conversation, model, _ = load(chat_model)
    model.args.sliding_window = 8
    for layer in model.layers:
        layer.attention.window = 8
    conversation._decoder.start()
    for _ in range(3):
        assert "".join(conversation.ask("longer")) == ANSWER
    assert conversation._decoder.caches[0].start > 0
    conversation.set_system("Short.")
    list(conversation.ask("x"))
    full = caches_of(model, conversation._ids)
    ours = conversation._decoder.caches[0].filled()[0][:, :, -8:]
    np.testing.assert_allclose(np.array(ours), np.array(full[0].filled()[0][:, :, -8:]), atol=2e-5)


def test_a_template_that_refuses_a_message_changes_nothing(chat_model):
    conversation, model, tokenizer = load(chat_model)
    refusing = ChatTemplate(chat_templates.MISTRAL_V1, "m", "<s>", "</s>")
    conversation = Conversation(model, tokenizer, refusing, arguments())
    with pytest.raises(ValueError, match="Only user and assistant roles|must alternate"):
        conversation.set_system("Be brief.")
    assert conversation.messages == []


def test_a_template_that_writes_nothing_is_an_error(chat_model):
    _, model, tokenizer = load(chat_model)
    conversation = Conversation(model, tokenizer, ChatTemplate("", "m", "", ""), arguments())
    with pytest.raises(ValueError, match="m makes no text of the messages"):
        list(conversation.ask("Hello"))


# -------------------------------------------------------------------------------------------------
# A bounded cache


@pytest.mark.parametrize("piece", [5, 100])
def test_a_bounded_cache_keeps_the_first_positions_and_the_last(piece):
    random = np.random.default_rng(1)
    whole = mx.array(random.normal(size=(1, 2, 300, 4)).astype(np.float32))
    cache = KVCache(whole[:, :, :0], whole[:, :, :0], max_size=64)
    piece = min(piece, cache.max_update)
    for start in range(0, 300, piece):
        part = whole[:, :, start : start + piece]
        cache.update(part, part + 1)
        assert cache.capacity <= 64 and cache.offset == min(start + piece, 300)
        keys, values = cache.filled()
        n = keys.shape[2]
        places = [*range(4), *range(cache.offset - n + 4, cache.offset)]
        assert mx.array_equal(keys, whole[:, :, mx.array(places)])
        assert mx.array_equal(values, keys + 1)
        assert n >= min(cache.offset, 32)
    assert cache.trim(298) and cache.filled()[0].shape[2] == n - 2
    assert not cache.trim(200)


def test_max_kv_size_bounds_what_is_remembered(chat_model):
    model, tokenizer = lora.load_model(chat_model, mx.float32)
    ids = tokenizer.encode("all of a long prompt, " * 20)
    for n_prompt in (len(ids), 3):
        bounded = decoder.Decoder(model, max_kv_size=40)
        list(islice(generate_step(model, ids[:n_prompt], decoder=bounded), 60))
        assert bounded.caches[0].capacity == 40
        assert bounded.offset == n_prompt + 60
    whole = list(islice(generate_step(model, ids[:9]), 20))
    bounded = decoder.Decoder(model, max_kv_size=40)
    assert list(islice(generate_step(model, ids[:9], decoder=bounded), 20)) == whole


def test_a_prompt_longer_than_the_context_is_a_warning(chat_model):
    flags = ("--model", chat_model, "--no-adapter", "-n", "2", "--max-kv-size", "32", "--prompt")
    process = call_script("lora.py", *flags, "long " * 80)
    assert process.returncode == 0, process.stderr
    assert re.search(r"lora.py: warning: the prompt has \d{3} tokens, and .* 100: ", process.stderr)
    assert "warning" not in call_script("lora.py", *flags, "short").stderr


# -------------------------------------------------------------------------------------------------
# On a terminal and in a pipe


def test_a_pipe_is_answered_line_by_line(chat_model, monkeypatch):
    flags = ("--model", chat_model, "--no-adapter", "--temp", "0", "--chat")
    content = f"{QUESTION}\r\n\n/etc/hosts 你好\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    process = call_script("lora.py", *flags)
    assert process.stdout.partition("Generating\n")[2] == f"{ANSWER}\n\n{ANSWER}\n"
    assert len(re.findall("^Prompt: ", process.stderr, re.MULTILINE)) == 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\n\xff\n")))
    process = call_script("lora.py", *flags)
    assert process.returncode == 2 and f"{ANSWER}\n" in process.stdout
    assert "error: line 2 of standard input is not valid UTF-8" in process.stderr


class Terminal:
    """lora.py on a pseudo-terminal."""

    def __init__(self, *flags):
        env = {**os.environ, "LC_ALL": "C.UTF-8", "TERM": "xterm", "PYTHONUTF8": "1"}
        command = [sys.executable, str(ROOT / "lora.py"), *map(str, flags)]
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.execve(sys.executable, command, env)
        self.output, self._seen = "", 0
        self._bytes = b""

    def expect(self, text):
        """Read up to a text that comes after what was expected before."""
        deadline = time.monotonic() + 60
        while text not in self.output[self._seen :]:
            ready = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, f"no {text!r} in {self.output!r}"
            try:
                self._bytes += os.read(self.fd, 1 << 16)
            except OSError:  # it has ended
                raise AssertionError(f"no {text!r} in {self.output!r}") from None
            self.output = self._bytes.decode(errors="ignore")
        self._seen = self.output.index(text, self._seen) + len(text)

    def send(self, text):
        os.write(self.fd, text.encode())

    def status(self):
        """Wait for its end."""
        try:
            while os.read(self.fd, 1 << 16):
                pass
        except OSError:
            pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_conversation_on_a_terminal(chat_model):
    terminal = Terminal("--model", chat_model, "--no-adapter", "--chat", "-n", 10**6, "--temp", 0)
    terminal.expect("/quit or Ctrl-D leaves")
    terminal.expect("> ")
    terminal.send(f"{QUESTION}\n")
    terminal.expect(f"{QUESTION}\r\n")
    terminal.expect(f"{ANSWER}\r\n")
    terminal.expect("> ")
    terminal.send("/system :\n")
    terminal.expect("> ")
    terminal.send("and 你好?\n")
    for _ in range(2):
        terminal.expect(ENDLESS * 3)
        terminal.send("\x03")  # Ctrl-C ends the answer
        terminal.expect("\r\n")
        terminal.expect("> ")
        terminal.send("\x1b[A\n")  # the line before, from the history
    terminal.expect(ENDLESS)
    terminal.send("\x03")
    terminal.expect("\r\n")
    terminal.expect("> ")
    terminal.send("not se")
    terminal.expect("not se")
    time.sleep(0.1)  # until readline waits: it does not notice a signal right before
    terminal.send("\x03")  # and here it gives the line up
    terminal.expect("/quit or Ctrl-D leaves")
    terminal.expect("> ")
    terminal.send("/help\n")
    terminal.expect("there is no /help: /reset starts again")
    terminal.send("/system\n")
    terminal.send("/reset\n")
    terminal.send("🦙\n")
    terminal.expect(f"{ANSWER}\r\n")
    terminal.expect("> ")
    terminal.send("/quit\n")
    assert terminal.status() == 0
    assert "Traceback" not in terminal.output and "Prompt:" not in terminal.output


def test_commands_do_what_they_say(chat_model, monkeypatch, capsys):
    conversation, *_ = load(chat_model, "-n", 12)
    lines = ["one", "/system Be brief.", "two", "", "/reset", "/reset now", "/nothing", "three"]
    lines = "".join(f"{line}\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    talk.on_terminal(conversation)
    system = {"role": "system", "content": "Be brief."}
    assert conversation.messages == [system, *said("three", conversation.messages[-1]["content"])]
    monkeypatch.setattr(sys, "stdin", io.StringIO("/system\n/quit\nnever\n"))
    talk.on_terminal(conversation)
    assert [m["content"] for m in conversation.messages][:1] == ["three"]
    output = capsys.readouterr()
    assert output.err.count("there is no /nothing: ") == 1
    assert ANSWER in output.out
