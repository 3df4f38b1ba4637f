"""Token ids kept next to a large data file: what they save, and when they do not count."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import MISTRAL_TOKENIZER, ROOT, small_disk

from parts import token_cache
from parts.token_cache import cache_file, open_partial, partial_file
from parts.tokenizers import Tokenizer

import lora

TOKENIZER = Tokenizer(MISTRAL_TOKENIZER)
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo 😀"}
RECORDS = {
    "text": [{"text": "one two"}, {"text": "three </s> four"}, {"text": "five <s>"}],
    "completion": [{"prompt": "Q: a\nA:", "completion": " b"}, {"prompt": "", "completion": "c"}],
    "chat": [{"messages": [USER, ASSISTANT]}, {"messages": [USER]}],
}


class Unused(Tokenizer):
    """A tokenizer that only tells what it is."""

    def encode_batch(self, *_, **__):
        raise AssertionError("tokenized again")


@pytest.fixture(autouse=True)
def every_file_is_large(monkeypatch):
    monkeypatch.setattr(token_cache, "LARGE", 1)


def write(path: Path, kind: str = "text", seconds_ago: float = 100, times: int = 1) -> Path:
    path.write_text("\n\n".join(map(json.dumps, RECORDS[kind] * times)) + "\n")
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path


def opened(path: Path, tokenizer: Tokenizer = TOKENIZER, **options) -> lora.Dataset:
    dset = lora.Dataset(path, **options)
    dset.encode(tokenizer)
    return dset


def is_read(path: Path, special_tokens: bool = False, **options) -> bool:
    """Whether the kept tokens take the place of tokenizing."""
    try:
        opened(path, Unused(MISTRAL_TOKENIZER, special_tokens=special_tokens), **options)
    except AssertionError:
        return False
    return True


def rows_of(dset: lora.Dataset) -> list[list[int]]:
    return [row.tolist() for row in dset.encode(dset._encoded[0])]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("masked", [False, True], ids=["all-count", "masked"])
@pytest.mark.parametrize("kind", RECORDS)
def test_another_start_reads_what_the_first_has_made(tmp_path, kind, masked):
    options = {"mask_prompt": masked and kind != "text"}
    if kind == "chat":
        options["chat_template"] = "llama2"
    path = write(tmp_path / "train.jsonl", kind)
    first = opened(path, **options)
    assert names(tmp_path) == ["train.jsonl", "train.jsonl.tokens"]
    second = opened(path, Unused(MISTRAL_TOKENIZER), **options)
    assert rows_of(second) == rows_of(first)
    assert list(second) == list(first)
    assert second.left_out == first.left_out
    ours, theirs = second._encoded[1], first._encoded[1]
    assert (ours.masked, ours.named, ours.digest()) == (
        options["mask_prompt"], theirs.named, theirs.digest()
    )  # fmt: skip
    if kind == "text":
        assert ours.named == (2, "</s>", f"{path}, line 3")


def test_small_files_have_none_and_new_ones_not_yet(tmp_path, monkeypatch):
    """A change in the same tick of the clock would not show."""
    opened(write(tmp_path / "train.jsonl", seconds_ago=0))
    assert names(tmp_path) == ["train.jsonl"]
    monkeypatch.undo()
    opened(write(tmp_path / "train.jsonl"))
    assert names(tmp_path) == ["train.jsonl"]


@pytest.mark.parametrize("how", ["truncated", "emptied", "zeros", 64, 70, 200, -30, -1])
def test_a_damaged_one_is_made_again(tmp_path, how):
    path = write(tmp_path / "train.jsonl")
    expected = rows_of(opened(path))
    whole = cache_file(path).read_bytes()
    content = bytearray(whole)
    if isinstance(how, int):
        content[how] ^= 1
    damaged = {"truncated": whole[:-1], "emptied": b"", "zeros": bytes(len(whole))}
    cache_file(path).write_bytes(damaged.get(how, content))
    assert not is_read(path)
    assert rows_of(opened(path)) == expected
    assert cache_file(path).read_bytes() == whole
    assert is_read(path)


def test_ids_that_the_tokenizer_lacks_do_not_count(tmp_path, monkeypatch):
    """Whoever gives away a data folder may have written anything there."""
    path = write(tmp_path / "train.jsonl")
    for foreign in (32000, -32001):
        cache_file(path).unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            ids = [[1, 5, foreign]] * 3
            patch.setattr(TOKENIZER, "encode_batch", lambda texts, ids=ids, **_: ids[: len(texts)])
            opened(path)
        assert cache_file(path).exists()
        assert not is_read(path)


def test_what_tokens_depend_on_makes_others(tmp_path, monkeypatch):
    path = write(tmp_path / "train.jsonl", "completion")
    opened(path)
    assert is_read(path)
    assert not is_read(path, special_tokens=True)
    assert not is_read(path, mask_prompt=True)
    os.utime(path, (time.time() - 50,) * 2)
    assert not is_read(path)
    opened(path)
    assert is_read(path)
    path.write_bytes(path.read_bytes() + b"\n")
    assert not is_read(path)
    write(path)
    opened(path)
    monkeypatch.setattr(token_cache, "DECIDES", ("records",))  # as if the code were another
    assert not is_read(path)

    chats = write(tmp_path / "chats.jsonl", "chat")
    opened(chats, chat_template="llama2")
    assert is_read(chats, chat_template="llama2")
    assert not is_read(chats, chat_template="mistral")


def test_one_that_another_process_writes_is_left_to_it(tmp_path):
    path = write(tmp_path / "train.jsonl")
    with open_partial(cache_file(path)) as other:
        other.write(b"what the other writes")
        expected = rows_of(opened(path))
        assert names(tmp_path) == ["train.jsonl", "train.jsonl.tokens.partial"]
        assert partial_file(cache_file(path)).read_bytes() == b"what the other writes"
    assert rows_of(opened(path)) == expected  # after a kill of the other, the file is taken over
    assert names(tmp_path) == ["train.jsonl", "train.jsonl.tokens"]
    rows = opened(path)
    with open_partial(cache_file(path)):
        assert rows_of(rows) == expected  # what is read stays
    # The other may have finished between this one's opening the file and locking it.
    assert is_read(path)


def test_what_is_not_ours_is_not_replaced(tmp_path):
    path = write(tmp_path / "train.jsonl")
    cache_file(path).write_text("somebody's own")
    opened(path)
    assert cache_file(path).read_text() == "somebody's own"
    assert names(tmp_path) == ["train.jsonl", "train.jsonl.tokens"]
    cache_file(path).unlink()
    os.mkfifo(cache_file(path))  # of which reading would wait for ever
    opened(path)
    cache_file(path).unlink()
    secret = tmp_path / "secret"
    secret.write_text("kept")
    partial_file(cache_file(path)).symlink_to(secret)
    assert len(opened(path)) == 3
    assert secret.read_text() == "kept"


def test_a_malformed_record_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "train.jsonl"
    monkeypatch.setattr(token_cache, "IN_MEMORY", 1)
    monkeypatch.setattr("parts.token_rows.BATCH", 1)
    lines = [{"messages": [USER, ASSISTANT]}, {"messages": [ASSISTANT]}]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="line 2: .*take turns"):
        opened(path, chat_template="llama2")
    assert names(tmp_path) == ["train.jsonl"]


@pytest.mark.parametrize("reason", ["Read-only file system", "No space left on device"])
def test_a_disk_that_does_not_take_it_is_a_warning(tmp_path, reason):
    """A real file system, which has no place, or is full when half is written."""
    disk = tmp_path / "disk"
    with small_disk(disk, "16k"):
        path = write(disk / "train.jsonl", times=100)  # three pages of four
        if "only" in reason:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        script = (
            "import sys; import lora; from parts import token_cache, token_rows\n"
            "token_cache.LARGE, token_cache.IN_MEMORY, token_rows.BATCH = 1, 4, 1\n"
            "from parts.tokenizers import Tokenizer\n"
            "rows = lora.Dataset(sys.argv[1]).encode(Tokenizer(sys.argv[2]))\n"
            "print([row.tolist() for row in rows])"
        )
        command = [sys.executable, "-c", script, str(path), str(MISTRAL_TOKENIZER)]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert names(disk) == ["train.jsonl"]
    (warning,) = process.stderr.splitlines()
    assert "train.jsonl.tokens cannot be written, so that each start tokenizes again" in warning
    assert reason in warning
    assert json.loads(process.stdout) == rows_of(opened(write(tmp_path / "a.jsonl"))) * 100


def test_a_disk_that_takes_not_even_the_first_byte_loses_no_token(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "train.jsonl")
    expected = rows_of(opened(write(tmp_path / "a.jsonl")))

    def open_unwritable(cache: Path):
        partial_file(cache).touch()
        return open(partial_file(cache), "rb", buffering=0)

    monkeypatch.setattr(token_cache, "open_partial", open_unwritable)
    assert rows_of(opened(path)) == expected
    assert "train.jsonl.tokens cannot be written" in capsys.readouterr().err
    assert not partial_file(cache_file(path)).exists()
