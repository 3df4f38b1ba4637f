"""Chats: the ids and masks of transformers on real templates, and templates that misbehave."""

import json
import os
import shutil
import signal
from datetime import datetime

import chat_templates
import numpy as np
import pytest
import tokenizers
from conftest import MISTRAL_TOKENIZER
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import PreTrainedTokenizerFast

from parts import chat
from parts.chat import ChatTemplate, answer_spans
from parts.records import Chat, Records
from parts.token_rows import encode_records
from parts.tokenizers import Tokenizer

SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)


def said(*contents: str, system: str | None = None) -> list[dict]:
    """A conversation of a user, who begins, and the assistant."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


CALL = {"function": {"name": "sum", "arguments": {"a": [1, 2], "ü": "<b>"}}}
TOOLS = [{"type": "function", "function": {"name": "sum", "description": "Adds <numbers> 😀"}}]
CALLING = [
    *said("add one and two"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]
ONE, TURNS = said("hi 😀", "yo"), said("ok", " Ärger 😀\n\nnew ", "ok", "\nb c", "ok", "ok")
THINKING = said("a", "<think>\nwhy\n</think>\n\nso", "b", "<think>\nhm\n</think>\n\nthen")
SYSTEM = said("hi", "yo 😀", "more", "no", system="Be brief.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder with a byte-level tokenizer, of which all templates' special tokens are."""
    folder = tmp_path_factory.mktemp("model")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([chat_templates.QWEN25, chat_templates.LLAMA2], trainer)
    model.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )


def encoded(folder, tmp_path, template, messages, tools=None, mask=True) -> np.ndarray:
    """The row of a chat, by way of its file."""
    (tmp_path / "t.jinja").write_text(template)
    record = {"messages": messages, "tools": tools}
    (tmp_path / "train.jsonl").write_text(json.dumps(record) + "\n")
    tokenizer = Tokenizer(folder / "tokenizer.json", 0, [1])
    return encode_records(
        Records(tmp_path / "train.jsonl"), tokenizer, mask, str(tmp_path / "t.jinja")
    )[0]


# What the assistant answers, read off each format by hand.
CASES = {
    "smollm2": (chat_templates.SMOLLM2, ONE, None, ["yo<|im_end|>"]),
    "smollm2-turns": (
        chat_templates.SMOLLM2, TURNS, None,
        [" Ärger 😀\n\nnew <|im_end|>", "\nb c<|im_end|>", "ok<|im_end|>"],
    ),
    "llama3": (chat_templates.LLAMA3, SYSTEM, None, ["yo 😀<|eot_id|>", "no<|eot_id|>"]),
    "llama3-turns": (
        chat_templates.LLAMA3, TURNS, None,
        ["Ärger 😀\n\nnew<|eot_id|>", "b c<|eot_id|>", "ok<|eot_id|>"],
    ),
    "llama2": (chat_templates.LLAMA2, SYSTEM, None, [" yo 😀 </s>", " no </s>"]),
    "mistral-v1": (
        chat_templates.MISTRAL_V1, TURNS, None, [" Ärger 😀\n\nnew </s>", "\nb c</s>", "ok</s>"]
    ),
    "mistral-v3": (chat_templates.MISTRAL_V3, TURNS, TOOLS,
                   [" Ärger 😀\n\nnew</s>", " b c</s>", " ok</s>"]),
    "mistral-v3-system": (chat_templates.MISTRAL_V3, SYSTEM, None, [" yo 😀</s>", " no</s>"]),
    "mistral-v3-calls": (
        chat_templates.MISTRAL_V3, CALLING, TOOLS,
        ['[TOOL_CALLS] [{"name": "sum", "arguments": {"a": [1, 2], "ü": "<b>"}}]</s>',
         " It is 3.</s>"],
    ),
    "tekken-calls": (
        chat_templates.TEKKEN, CALLING, TOOLS,
        ['[TOOL_CALLS][{"name": "sum", "arguments": {"a": [1, 2], "ü": "<b>"}}]</s>',
         "It is 3.</s>"],
    ),
    "qwen3-calls": (
        chat_templates.QWEN3, CALLING, TOOLS,
        ['<tool_call>\n{"name": "sum", "arguments": {"a": [1, 2], "ü": "<b>"}}\n</tool_call>'
         "<|im_end|>", "<think>\n\n</think>\n\nIt is 3.<|im_end|>"],
    ),
    "qwen3-system": (chat_templates.QWEN3, SYSTEM, TOOLS,
                     ["yo 😀<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>"]),
    "tekken": (chat_templates.TEKKEN, SYSTEM, TOOLS, ["yo 😀</s>", "no</s>"]),
    "qwen25": (chat_templates.QWEN25, SYSTEM, None, ["yo 😀<|im_end|>", "no<|im_end|>"]),
    "qwen25-calls": (
        chat_templates.QWEN25, CALLING, TOOLS,
        ['<tool_call>\n{"name": "sum", "arguments": {"a": [1, 2], "ü": "<b>"}}\n</tool_call>'
         "<|im_end|>", "It is 3.<|im_end|>"],
    ),
    "qwen3": (
        chat_templates.QWEN3, TURNS, None,
        [" Ärger 😀\n\nnew <|im_end|>", "\nb c<|im_end|>", "<think>\n\n</think>\n\nok<|im_end|>"],
    ),
    "qwen3-thoughts": (
        chat_templates.QWEN3, THINKING, None,
        ["so<|im_end|>", "<think>\nhm\n</think>\n\nthen<|im_end|>"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_ids_and_answers_of_real_templates(folder, theirs, tmp_path, name):
    template, messages, tools, answers = CASES[name]
    expected = theirs.apply_chat_template(
        messages, tools=tools, chat_template=template, return_dict=True
    )["input_ids"]
    assert encoded(folder, tmp_path, template, messages, tools, mask=False).tolist() == expected
    row = encoded(folder, tmp_path, template, messages, tools)
    assert np.where(row < 0, ~row, row).tolist() == expected
    ours = ChatTemplate(template, name, "<s>", "</s>")
    text, spans = answer_spans(ours, Chat(messages, tools), frozenset(SPECIAL))
    assert text == theirs.apply_chat_template(
        messages, tools=tools, chat_template=template, tokenize=False
    )
    assert [text[start:end] for start, end in spans] == answers
    assert (row >= 0).tolist() == counting(theirs, text, spans)


def counting(theirs, text, spans) -> list[bool]:
    """Which tokens hold a character of a span, by the offsets of Hugging Face's tokenizer."""
    offsets = theirs(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [any(a < end and start < b for start, end in spans) for a, b in offsets]


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("tokenizer.model.v1", chat.BUILT_IN["mistral"]),
        ("mistral_instruct_tokenizer_240216.model.v2", chat.BUILT_IN["mistral"]),
        ("mistral_instruct_tokenizer_240323.model.v3", chat_templates.MISTRAL_V3),
    ],
)
def test_ids_of_mistrals_tokenizers_are_those_of_mistral_common(tmp_path, name, template):
    """Which knows of no templates."""
    shutil.copy(MISTRAL_TOKENIZER.parent / name, tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    theirs = MistralTokenizer.from_file(str(MISTRAL_TOKENIZER.parent / name))
    messages = said("hi 😀 there", "yo  Ärger\n\nb", "more", "no")
    ours = ChatTemplate(template, name, "<s>", "</s>")
    for n in (1, 3):
        text = ours.render(Chat(messages[:n], None), True).text
        ids = tokenizer.encode(text, bos=False, special_tokens=True)
        request = ChatCompletionRequest(messages=messages[:n])
        assert ids == theirs.encode_chat_completion(request).tokens


@pytest.mark.parametrize("name", chat.BUILT_IN)
@pytest.mark.parametrize("messages", [ONE, TURNS, SYSTEM], ids=["one", "turns", "system"])
def test_masks_of_marked_templates_are_those_of_transformers(
    folder, theirs, tmp_path, name, messages
):
    expected = theirs.apply_chat_template(
        messages,
        chat_template=chat.BUILT_IN[name],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    row = encoded(folder, tmp_path, chat.BUILT_IN[name], messages)
    assert np.where(row < 0, ~row, row).tolist() == expected["input_ids"]
    assert (row >= 0).tolist() == [bool(m) for m in expected["assistant_masks"]]


@pytest.mark.parametrize(
    ("name", "published"),
    [("llama3", "LLAMA3"), ("llama2", "LLAMA2"), ("chatml", "QWEN25"), ("chatml", "SMOLLM2")],
)
def test_the_built_in_templates_are_the_published_formats(name, published):
    ours = ChatTemplate(chat.BUILT_IN[name], name, "<s>", "</s>")
    real = ChatTemplate(getattr(chat_templates, published), published, "<s>", "</s>")
    for n in (2, 3, 5):
        messages = Chat(SYSTEM[:n], None)
        prompts = n % 2 == 0
        assert ours.render(messages, prompts).text == real.render(messages, prompts).text


def test_marks_that_a_template_only_speaks_of_are_none(folder, tmp_path):
    spoken = "{# no {% endgeneration %} here #}" + chat_templates.QWEN25
    row = encoded(folder, tmp_path, spoken, ONE)
    assert row.tolist() == encoded(folder, tmp_path, chat_templates.QWEN25, ONE).tolist()


def test_an_ambiguous_template_is_refused_with_the_line(folder, tmp_path):
    joined = "{{ messages | map(attribute='content') | sort | join }}"
    with pytest.raises(ValueError, match=r"train.jsonl, line 1: .*t.jinja does not show which tok"):
        encoded(folder, tmp_path, joined, said("zz", "bb"))


@pytest.mark.parametrize("name", chat.BUILT_IN)
def test_a_content_of_several_texts_is_their_sum_and_tools_are_refused(name):
    ours = ChatTemplate(chat.BUILT_IN[name], f"--chat-template {name}", "<s>", "</s>")
    parts = [
        {
            **m,
            "content": [{"type": "text", "text": t} for t in (m["content"][:2], m["content"][2:])],
        }
        for m in SYSTEM
    ]
    assert ours.render(Chat(parts, None)) == ours.render(Chat(SYSTEM, None))
    says = f"--chat-template {name} does not work: it has no tools: give the template that"
    for chat_with_tools in (Chat(ONE, TOOLS), Chat(CALLING, None)):
        with pytest.raises(ValueError, match=says):
            ours.render(chat_with_tools)


@pytest.mark.parametrize("name", ["QWEN25", "SMOLLM2", "LLAMA3", "MISTRAL_V3"])
def test_an_answer_before_any_question_is_not_guessed(folder, tmp_path, name):
    """Its header would be taken for a part of it."""
    messages = [{"role": "assistant", "content": "Hello."}, *ONE]
    with pytest.raises(ValueError, match=r"line 1: .* does not show .* in message 1: give it"):
        encoded(folder, tmp_path, getattr(chat_templates, name), messages)


BAD = {
    "insides": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "attribute '__class__' of 'str'"),
    "files": ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
    "syntax": ("{% if %}", "line 1: Expected an expression"),
    "raises": ("{{ raise_exception('no\nway') }}", "no way"),
    "undefined": ("{{ a.b.c }}", "'a' is undefined"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deep"),
    "memory": ("{{ 'a' * 10**11 }}", "needs more than 2048 MB"),
    "range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
}
RANGE = "{% for x in range(99999) %}"
ENDLESS = {
    "loops": RANGE * 3 + "{% endfor %}" * 3,
    "one-operation": "{{ 10 ** (10 ** 10) }}",
    "doubling": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_template_must_not_do_is_one_line(name):
    source, says = BAD[name]
    with pytest.raises(ValueError, match="^bad does not work: .*" + says) as error:
        ChatTemplate(source, "bad", "", "").render(Chat(ONE, None))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_never_ends_is_ended(name):
    with pytest.raises(ValueError, match="^bad does not work: it takes more than 0.2 s"):
        ChatTemplate(ENDLESS[name], "bad", "", "", seconds=0.2).render(Chat(ONE, None))


def test_a_renderer_ends_with_whoever_asks():
    template = ChatTemplate("{{ 1 }}", "t", "", "")
    process = template._process
    os.kill(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal might
    assert template.render(Chat(ONE, None)).text == "1"
    process.stdin.close()  # as the system does when a process is killed
    assert process.wait(5) == 0


def test_a_template_with_todays_date_trains_with_the_same_on_each_day(folder, tmp_path):
    """Else a run could not be resumed the day after. A prompt has today's."""
    source = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    row = encoded(folder, tmp_path, source, ONE, mask=False)
    tokenizer = Tokenizer(folder / "tokenizer.json", 0, [1])
    assert tokenizer.decode(row.tolist()) == "26 Jul 2024: hi 😀"
    before = datetime.now()
    text = chat.load_template(str(tmp_path / "t.jinja"), folder, tokenizer).render(Chat(ONE, None))
    days = {f"{day:%d %b %Y}: hi 😀" for day in (before, datetime.now())}
    assert text.text in days


def test_a_model_without_a_template_says_what_to_give(folder, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": ONE}) + "\n")
    tokenizer = Tokenizer(folder / "tokenizer.json", 0, [1])
    records = Records(tmp_path / "train.jsonl")
    with pytest.raises(FileNotFoundError, match="holds chats: .* has no chat_templ.*chatml"):
        encode_records(records, tokenizer, False, None)
    with pytest.raises(FileNotFoundError, match="--chat-template chat is no file, and none of "):
        encode_records(records, tokenizer, False, "chat")
    assert len(encode_records(records, tokenizer, False, "mistral")[0]) > 5
