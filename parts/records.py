"""A JSONL file of texts, of prompts with their completions, or of chats.

{"text": "..."}
{"prompt": "...", "completion": "..."}
{"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}

A file's first record says which of these it holds; where it has the keys of several, the first of
them in this order counts. All other records are of that kind. Further keys are ignored. Of a large
file, the records stay there until they are read: it may be larger than the memory.
"""

import json
from array import array
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from parts.token_cache import BAR_DELAY, Saved, is_large, read_cache, stamp

ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
CONTENT_KEYS = ("tool_calls", "function_call", "reasoning_content")  # in place of a content


class Completion(NamedTuple):
    """A prompt, and the text that is to follow it."""

    prompt: str
    completion: str


class Chat(NamedTuple):
    """The messages of a conversation, as chat templates take them, and the tools it may call."""

    messages: list[dict]
    tools: list[dict] | None


Record = str | Completion | Chat


class Records:
    """The records of a JSONL file. key: of a text.

    All are checked at once, but those of a large file that were when their tokens were saved. Of a
    small file they are kept; those of a large one are read again when they are asked for.
    Raises ValueError, which names the file and the line, where one is malformed, or all are
    missing.
    """

    def __init__(self, path: str | Path, key: str = "text"):
        self.path, self._key = path, key
        self._file = open(path, "rb")  # noqa: SIM115  as long as the records
        self.as_read = stamp(self._file.fileno(), key)
        self.is_large = is_large(self.as_read)
        self._kept: list[Record] | None = None
        self.saved: Saved | None = read_cache(path, self.as_read) if self.is_large else None
        if self.saved is not None:
            self.kind = self.saved.about["kind"]
            self.starts, self.lines = self.saved.arrays["starts"], self.saved.arrays["lines"]
        else:
            self._check(self.as_read[0])

    def _check(self, size: int) -> None:
        """Read all records. size: of the file, in bytes."""
        path, key = self.path, self._key
        self.kind, self.starts, self.lines = "", array("q"), array("q")  # bytes; line numbers
        self._kept, start = None if self.is_large else [], 0
        bar = {"unit": "B", "unit_scale": True, "leave": False, "delay": BAR_DELAY}
        with tqdm(None, f"Reading {path}", size, disable=None, **bar) as progress:
            for number, line in enumerate(self._file, start=1):
                if line.strip():
                    record = parse_object(line, self._place(number), key)
                    self.kind = self.kind or kind_of(record, key)
                    record = check_record(record, self.kind, self._place(number), key)
                    if self._kept is not None:
                        self._kept.append(record)
                    self.starts.append(start)
                    self.lines.append(number)
                start += len(line)
                progress.update(len(line))
        if not self.starts:
            raise ValueError(f"{path} is empty: {expected(key)}")

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Record:
        if self._kept is not None:
            return self._kept[index]
        self._file.seek(self.starts[index])
        place = self.place(index)
        record = parse_object(self._file.readline(), place, self._key)
        return check_record(record, self.kind, place, self._key)

    def place(self, index: int) -> str:
        """Return where a record stands, such as "data/train.jsonl, line 3"."""
        return self._place(self.lines[index])

    def _place(self, number: int) -> str:
        return f"{self.path}, line {number}"


def parse_record(line: bytes, key: str, place: str) -> Record:
    """Return the record in one line, of whichever kind it is. key: of a text. Raises ValueError,
    which names `place`, and says what the line holds instead.
    """
    record = parse_object(line, place, key)
    return check_record(record, kind_of(record, key), place, key)


def parse_object(line: bytes, place: str, key: str = "text") -> object:
    """Return what a line of JSON holds. Raises ValueError, which names `place`."""
    try:
        content = line.decode("utf-8-sig").strip()
        return json.loads(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        if content.startswith("[") or content == "{":
            kind = "an array" if content.startswith("[") else "an object"
            raise ValueError(f"{place} begins {kind} of many lines: {expected(key)}") from error
        raise ValueError(f"{place} is not JSON: {error.msg}, at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error


def kind_of(record: object, key: str = "text") -> str:
    """Return "text", "completion" or "chat"."""
    if isinstance(record, dict) and key == "text" and key not in record:
        if "messages" in record:
            return "chat"
        if "prompt" in record or "completion" in record:
            return "completion"
    return "text"


def check_record(record: object, kind: str, place: str, key: str = "text") -> Record:
    """Return a record of a file of this kind. Raises ValueError, which names `place`."""
    check = {"text": check_text, "completion": check_completion, "chat": check_chat}[kind]
    checked = check(record, place, key)
    try:
        text = json.dumps(checked, ensure_ascii=False) if kind == "chat" else "".join(checked)
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} holds half a character: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{place} is nested too deep") from error
    return checked


def check_text(record: object, place: str, key: str) -> str:
    """Return the text of a record."""
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place} has no {key}: {describe(record, key)}; {expected(key)}")
    return text


def check_completion(record: object, place: str, _: str) -> Completion:
    """Return the prompt, which may be empty, and the completion of a record."""
    values = [record.get(key) for key in Completion._fields] if isinstance(record, dict) else []
    for key, value in zip(Completion._fields, values or [None, None], strict=True):
        if not isinstance(value, str) or not (value.strip() or key == "prompt"):
            raise ValueError(
                f"{place} has no {key}: {describe(record, key)}; each line holds one "
                '{"prompt": "...", "completion": "..."}, as the first does'
            )
    return Completion(*values)


def check_chat(record: object, place: str, _: str) -> Chat:
    """Return the messages and the tools of a record."""
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{place} has no messages: {describe(record, 'messages')}; each line holds one "
            '{"messages": [{"role": "user", "content": "..."}, ...]}, as the first does'
        )
    for number, message in enumerate(messages, start=1):
        check_message(message, f"{place}, message {number}")
    tools = record.get("tools")
    if not (tools is None or (isinstance(tools, list) and all(isinstance(t, dict) for t in tools))):
        raise ValueError(f"{place}: its tools are {shortened(tools)}, and no list of objects")
    return Chat(messages, tools or None)


def check_message(message: object, place: str) -> None:
    """Raise ValueError where a message has no role, or nothing to say."""
    if not isinstance(message, dict):
        raise ValueError(f'{place} is {shortened(message)}, and not {{"role": "...", ...}}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{place} has the role {shortened(role)}: give one of {', '.join(ROLES)}")
    if content is None and role == "assistant" and any(message.get(key) for key in CONTENT_KEYS):
        return
    parts = content if isinstance(content, list) else []
    if parts and all(isinstance(part, dict) and is_text(part) for part in parts):
        return
    if not isinstance(content, str):
        raise ValueError(f"{place} has no content that is a text: {describe(message, 'content')}")


def is_text(part: dict) -> bool:
    """Whether a part of a content is a text, and no picture or sound."""
    return part.get("type", "text") == "text" and isinstance(part.get("text"), str)


# -------------------------------------------------------------------------------------------------
# What errors say


def expected(key: str) -> str:
    """Return what an error says of the lines that are wanted."""
    chats = ", or prompts or chats" if key == "text" else ""
    return f'each line holds one {{"{key}": "..."}}{chats}'


def describe(record: object, key: str) -> str:
    """Return what a line holds that has nothing fit under `key`."""
    if isinstance(record, list):
        return "it is a JSON array"
    if not isinstance(record, dict):
        return f"it is {shortened(record)}"
    if key in record:
        return f"its {key} is {shortened(record[key])}"
    names = ", ".join(shortened(name) for name in list(record)[:8])
    return f"its keys are {names}" if names else "it has no keys"


def shortened(value: object) -> str:
    """Return a value as JSON has it, of 40 characters at most."""
    try:
        text = json.dumps(value)
    except RecursionError:  # writing takes some levels more than reading
        return "nested too deep"
    return text if len(text) <= 40 else f"{text[:36]} ..."
