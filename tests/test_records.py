"""Texts, prompts with completions and chats: what a file may hold, and what malformed ones say."""

import functools
import json
import random
from collections import Counter

import pytest
from conftest import MISTRAL_TOKENIZER

from parts import token_rows
from parts.records import Chat, Completion, Records
from parts.token_rows import encode_records
from parts.tokenizers import Tokenizer

import lora

TOKENIZER = Tokenizer(MISTRAL_TOKENIZER)
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo 😀"}
LINES = {
    "text": {"text": "one", "id": 7},
    "completion": {"prompt": "Q: a\nA:", "completion": " b", "id": 7},
    "chat": {"messages": [USER, ASSISTANT], "tools": [{"type": "function"}], "id": 7},
}


def records(tmp_path, *lines, key="text") -> Records:
    """The records of a file with these lines, objects or bytes."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n"
                              for x in lines))  # fmt: skip
    return Records(path, key)


@pytest.mark.parametrize("kind", LINES)
def test_the_first_record_says_what_a_file_holds_and_further_keys_are_ignored(tmp_path, kind):
    found = records(tmp_path, b"", LINES[kind], b"  ", LINES[kind])
    assert found.kind == kind
    assert len(found) == 2
    expected = {
        "text": "one",
        "completion": Completion("Q: a\nA:", " b"),
        "chat": Chat([USER, ASSISTANT], [{"type": "function"}]),
    }
    assert found[1] == found[0] == expected[kind]
    assert found.place(1).endswith("train.jsonl, line 4")


@pytest.mark.parametrize("first", LINES)
@pytest.mark.parametrize("second", LINES)
def test_a_file_holds_one_kind(tmp_path, first, second):
    if first == second:
        return
    with pytest.raises(ValueError, match="train.jsonl, line 2 has no "):
        records(tmp_path, LINES[first], LINES[second])


def test_of_several_kinds_in_a_record_a_text_comes_first_then_a_chat(tmp_path):
    everything = {**LINES["completion"], **LINES["chat"], **LINES["text"]}
    assert records(tmp_path, everything).kind == "text"
    del everything["text"]
    assert records(tmp_path, everything).kind == "chat"
    assert records(tmp_path, everything, key="prompt")[0] == "Q: a\nA:"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"prompt": "a"}, 'no completion: its keys are "prompt"'),
        ({"completion": "a"}, 'no prompt: its keys are "completion"'),
        ({"prompt": "a", "completion": " "}, 'no completion: its completion is " "'),
        ({"prompt": 1, "completion": "a"}, "no prompt: its prompt is 1"),
        ({"messages": []}, r"no messages: its messages is \[\]"),
        ({"messages": ["a"]}, 'line 1, message 1 is "a"'),
        ({"messages": [USER, {"content": "a"}]}, "line 1, message 2 has the role null: give one"),
        ({"messages": [{"role": "bot", "content": "a"}]}, 'message 1 has the role "bot"'),
        ({"messages": [{"role": "user"}]}, "message 1 has no content that is a text"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 has no content that is"),
        ({"messages": [{"role": "user", "content": 5}]}, "message 1 has no content that is a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "1 has no content that"),
        ({"messages": [USER], "tools": "a"}, 'its tools are "a", and no list'),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "holds half a character"),
        ({"prompt": "\udc00", "completion": "a"}, "holds half a character"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, line, says):
    with pytest.raises(ValueError, match=f"train.jsonl, line 1.*{says.removeprefix('line 1')}"):
        records(tmp_path, line)


def test_an_answer_may_be_calls_alone_and_a_content_parts_of_text(tmp_path):
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    assert records(tmp_path, {"messages": [parts, calls]})[0].messages == [parts, calls]


def test_prompts_are_masked_by_trls_rules(tmp_path):
    """The prompt's tokens, as it has them alone, and then those of both, with EOS."""
    pairs = [("Q: a\nA:", " b c"), ("", "a"), ("Über 😀 ", "x"), ("in", "separable")]
    found = records(tmp_path, *({"prompt": p, "completion": c} for p, c in pairs))
    masked = encode_records(found, TOKENIZER, True, None)
    plain = encode_records(found, TOKENIZER, False, None)
    for row, all_counts, (prompt, completion) in zip(masked, plain, pairs, strict=True):
        pieces = TOKENIZER._reader._model  # SentencePiece itself
        ids = [pieces.bos_id(), *pieces.encode(prompt + completion), pieces.eos_id()]
        n = 1 + len(pieces.encode(prompt))
        assert all_counts.tolist() == ids
        assert row.tolist() == [~i for i in ids[:n]] + ids[n:]


def spoiled(rng: random.Random, whole: dict) -> bytes:
    """A record's line, with something wrong in its values or its bytes."""
    record = json.loads(json.dumps(whole))
    holder = record
    for _ in range(rng.randrange(4)):  # go down to some value
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if not isinstance(holder[key], dict | list) or not holder[key]:
            break
        holder = holder[key]
    key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    wrong = [
        None,
        0,
        -1.5,
        True,
        [],
        {},
        "",
        " ",
        "\x00",
        "\ud83d",
        "x" * 99,
        [[]],
        [None],
        {"": 0},
    ]
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(wrong)
    line = bytearray(json.dumps(record, ensure_ascii=rng.random() < 0.5), "utf-8", "surrogatepass")
    for _ in range(rng.choice([0, 0, 1, 3])):
        at = rng.randrange(len(line))
        line[at : at + rng.randrange(3)] = bytes(rng.choices(b'{}[]":,\\\x00\xff\n0a', k=1))
    return bytes(line)


def test_500_malformed_files_are_data_or_one_line(tmp_path, monkeypatch):
    """The fuzzing of tests/benchmarks, for all kinds and with each flag; the templates' processes
    stay from file to file.
    """
    monkeypatch.setattr(token_rows, "load_template", functools.cache(token_rows.load_template))
    rng, n_errors, kinds = random.Random(0), 0, Counter()
    for _ in range(500):
        whole = dict(rng.choice(list(LINES.values())))
        if rng.random() < 0.7:
            whole.pop("tools", None)  # which no built-in template has
        lines = [json.dumps(whole).encode()] * rng.randrange(2) + [spoiled(rng, whole)]
        path = tmp_path / "train.jsonl"
        path.write_bytes(b"\n".join(lines))
        masked, template = rng.random() < 0.5, rng.choice(["chatml", "llama2", "llama3", "mistral"])
        try:
            dset = lora.Dataset(path, mask_prompt=masked, chat_template=template)
            rows = dset.encode(TOKENIZER)
        except ValueError as error:
            n_errors += 1
            assert "train.jsonl" in str(error)
            assert "\n" not in str(error)
        else:
            kinds[type(dset[0]), masked] += 1
            assert len(rows) + len(dset.left_out) == len(lines)
    assert 100 < n_errors < 450
    assert all(kinds[kind, masked] > 5 for kind in (Completion, Chat) for masked in (False, True))
    assert kinds[str, False] > 5
