"""A line of JSONL to a text."""

import json


def parse_record(line: bytes, key: str, place: str) -> str:
    """Return the text under `key` in the object of one line. Raises ValueError, which names
    `place`, and says what the line holds instead.
    """
    try:
        content = line.decode("utf-8-sig").strip()
        record = json.loads(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        if content.startswith("[") or content == "{":
            kind = "an array" if content.startswith("[") else "an object"
            raise ValueError(f"{place} begins {kind} of many lines: {expected(key)}") from error
        raise ValueError(f"{place} is not JSON: {error.msg}, at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place} has no {key}: {describe(record, key)}; {expected(key)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} holds half a character: {error}") from error
    return text


def expected(key: str) -> str:
    """Return what an error says of the lines that are wanted."""
    return f'each line holds one {{"{key}": "..."}}'


def describe(record: object, key: str) -> str:
    """Return what a line holds that has no text under `key`."""
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
