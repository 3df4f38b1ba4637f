"""A file of prompts, one a line: JSON objects of the kinds that parts/records.py reads, or text.

{"prompt": "..."}
{"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}
{"text": "..."}
any other line

A file is of objects if its first line is one, and its first record says of which kind; further keys
go with the answer. What a data set has as the right answer, a completion or the last message, is
not shown to the model. Empty lines count for nothing. Text and such objects in one file are an
error: answers to lines that were misread would look right.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

from parts.cli import did_you_mean
from parts.files import check_content, decode_text
from parts.records import Chat, check_chat, check_text, describe, kind_of, parse_object


KEYS = {"prompt", "messages", "text"}
ALL_THE_SAME = "give all lines as objects, or all as text"


class Prompt(NamedTuple):
    """What a line asks, where it stands, and what else it holds, which the answer repeats."""

    content: str | Chat
    place: str
    others: dict


def read_prompts(path: str) -> list[Prompt]:
    """Return the prompts of a file, or with "-" those of standard input.

    Raises FileNotFoundError, or ValueError, which names the file and the line.
    """
    if path == "-":
        if sys.stdin is None:
            raise ValueError("--prompts - reads standard input, which is closed")
        name, content = "standard input", sys.stdin.buffer.read()
    else:
        if Path(path).is_file():
            check_content(path)
        elif Path(path).is_dir() or not Path(path).exists():  # others, such as a pipe, can be read
            raise FileNotFoundError(f"--prompts {path} is no file{did_you_mean(path)}")
        name, content = path, Path(path).read_bytes()
    lines = [(line, f"{name}, line {i}") for i, line in enumerate(decode_lines(content, name), 1)]
    lines = [(line, place) for line, place in lines if line.strip()]
    if not lines:
        raise ValueError(f"{name} is empty: each line holds one prompt")
    if not is_object(*lines[0]):
        for line, place in lines[1:]:
            check_text_line(line, place)
        return [Prompt(line, place, {}) for line, place in lines]
    records = []
    for line, place in lines:
        if not line.lstrip().startswith(("{", "[")):
            raise ValueError(
                f"{place} is text, and the first line is a JSON object: {ALL_THE_SAME}"
            )
        records.append((parse_object(line.encode(), place), place))
    kind = kind_of(records[0][0])
    return [make_prompt(record, kind, place) for record, place in records]


def has_chats(prompts: list[Prompt] | None) -> bool:
    """Whether a chat template is needed, other than for --chat."""
    return any(isinstance(prompt.content, Chat) for prompt in prompts or ())


def decode_lines(content: bytes, name: str) -> list[str]:
    """Return the lines of a text. Raises ValueError, which names the line that is not UTF-8."""
    try:
        return decode_text(content, name).split("\n")
    except ValueError:
        for number, line in enumerate(content.split(b"\n"), start=1):
            decode_text(line, f"{name}, line {number}")
        raise


def check_text_line(line: str, place: str) -> None:
    """Raise ValueError where a line among text is an object that holds a prompt."""
    if not line.lstrip().startswith("{"):
        return
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return
    if KEYS & record.keys():
        raise ValueError(f"{place} is a JSON object, and the first line is text: {ALL_THE_SAME}")


def is_object(line: str, place: str) -> bool:
    """Whether a line is a JSON object. Raises ValueError where it begins as JSON, but is none."""
    begins = line.strip()
    if begins in ("[", "{") or begins.startswith("[{"):
        kind = "object of many lines" if begins == "{" else "array"
        raise ValueError(f"{place} begins a JSON {kind}: give one object a line")
    if begins.startswith('{"'):
        return isinstance(parse_object(line.encode(), place), dict)
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def make_prompt(record: object, kind: str, place: str) -> Prompt:
    """Return the prompt of a record of this kind. Raises ValueError, which names `place`."""
    if kind == "chat":
        content, used = asked(check_chat(record, place, ""), place), {"messages"}
    elif kind == "completion":
        content, used = record.get("prompt") if isinstance(record, dict) else None, {"prompt"}
        if not isinstance(content, str):
            raise ValueError(
                f"{place} has no prompt: {describe(record, 'prompt')}; each line holds one "
                '{"prompt": "..."}, as the first does'
            )
    elif isinstance(record, dict) and "text" in record:
        content, used = check_text(record, place, "text"), {"text"}
    else:
        raise ValueError(
            f"{place} has no text: {describe(record, 'text')}; each line holds one "
            '{"prompt": "..."}, {"messages": [...]} or {"text": "..."}, all of a file the same'
        )
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} holds half a character: {error}") from error
    others = {key: value for key, value in record.items() if key not in used | {"completion"}}
    return Prompt(content, place, others)


def asked(chat: Chat, place: str) -> Chat:
    """Return the chat up to its last message that is not the assistant's."""
    messages = list(chat.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise ValueError(f"{place} asks nothing: all messages are the assistant's")
    return Chat(messages, chat.tools)


def answered(prompt: Prompt, answer: str, reason: str) -> dict:
    """Return the record that is written: the prompt with its answer, as a data set has them.

    reason: "stop" where the answer ended by itself, "length" where there were no tokens left.
    """
    if isinstance(prompt.content, Chat):
        message = {"role": "assistant", "content": answer}
        record = {"messages": [*prompt.content.messages, message]}
    else:
        record = {"prompt": prompt.content, "completion": answer}
    return {**record, **prompt.others, "finish_reason": reason}
