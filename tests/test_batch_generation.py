"""Many prompts at once: each is answered as it would be alone, whatever is beside it."""

import json
import os
import random
import shutil
import subprocess
import sys
from itertools import islice

import pytest
from conftest import QUICK, ROOT, call_script, write_quick_model

from parts import decoder, decoder_batch, decoder_batch_cpu, device  # before MLX, for its BLAS
from parts.batch_generation import AnswerRow, rows_that_fit
from parts.decoder import generate_step
from parts.continuous_batching import generate_rows, group_sizes
from parts.prompt_file import read_prompts
from parts.sampling import Sampling

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

import lora
from models import Model, ModelArgs, add_lora, quantizable

SMALL = {**QUICK, "vocab_size": 300, "n_layers": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "grouped heads": {},
    "window": {"sliding_window": 7},
    "norms and biases": {"qk_norm": True, "attention_bias": True, "n_kv_heads": 4},
    "scaled": {"rope_scaling": YARN, "n_kv_heads": 1},
}


class Row:
    """A prompt that is answered with `n` tokens, or up to the token `end`."""

    def __init__(self, prompt_ids, n, end=None):
        self.prompt_ids, self.n, self.end, self.ids = prompt_ids, n, end, []

    def left(self):
        return self.n - len(self.ids)

    def add(self, token):
        self.ids.append(token)
        return token == self.end or not self.left()


@pytest.fixture(params=["here", "without room", "without MKL", "as on a GPU"])
def all_ways(request, models, monkeypatch):
    """The device as it is; a CPU that has no memory for copies of weights, or no fast BLAS of MLX;
    and in the way of a GPU that has no kernels of ours.
    """
    if request.param != "here" and not device.ON_CPU:
        pytest.skip("this is a GPU")
    if request.param == "without room":
        monkeypatch.setattr(device, "free_memory", lambda: 0)
    if request.param == "without MKL":
        monkeypatch.setattr(device, "FAST_BLAS", None)
    if request.param == "as on a GPU":
        if not shutil.which("g++"):
            pytest.skip("no compiler for a CPU in its place")
        monkeypatch.setattr(device, "ON_CPU", False)
    for model in models.values():
        vars(model).pop("cpu_decoder", None)
    monkeypatch.setattr(decoder_batch_cpu, "WIDEST", 24)
    monkeypatch.setattr(decoder_batch, "ROOM", 8)  # so that columns move often


@pytest.fixture(scope="module")
def models():
    mx.random.seed(3)
    made = {}
    for name, options in MODELS.items():
        made[name] = Model(ModelArgs(**{**SMALL, **options}))
        made[name].output.weight = made[name].output.weight * 4
    made["quantized"] = Model(ModelArgs(**SMALL))
    nn.quantize(made["quantized"], 32, 4, class_predicate=quantizable)
    add_lora(made["quantized"], [0, 1], ["wq", "wv", "w2"])
    for layer in made["quantized"].layers:
        layer.attention.wq.lora_b = mx.random.normal(layer.attention.wq.lora_b.shape) * 0.1
    return made


def make_rows(n, lengths=(1, 2, 3, 9, 70), tokens=(1, 2, 8, 20)):
    rng = random.Random(n)
    prompts = [[rng.randrange(250) for _ in range(rng.choice(lengths))] for _ in range(n)]
    return [Row(prompt, rng.choice(tokens)) for prompt in prompts]


def alone(model, row):
    return list(islice(generate_step(model, row.prompt_ids), row.n))


# -------------------------------------------------------------------------------------------------
# Rows of a batch


@pytest.mark.usefixtures("all_ways")
@pytest.mark.parametrize("name", [*MODELS, "quantized"])
def test_each_row_has_the_tokens_that_it_has_alone(models, name):
    rows = make_rows(13)
    ended = list(generate_rows(models[name], rows, 4))
    assert sorted(map(id, ended)) == sorted(map(id, rows))
    assert [row.ids for row in rows] == [alone(models[name], row) for row in rows]


@pytest.mark.skipif(not device.ON_CPU, reason="a CPU copies weights")
def test_copies_of_weights_are_kept_until_a_weight_changes():
    model = Model(ModelArgs(**SMALL))
    model.output.weight = model.output.weight * 4
    rows = make_rows(3)
    list(generate_rows(model, rows, 3))
    kept = decoder_batch_cpu.cpu_decoder(model)
    assert kept and decoder_batch_cpu.cpu_decoder(model) is kept
    layer = model.layers[1].feed_forward.w2
    layer.weight = layer.weight * -40
    again = make_rows(3)
    list(generate_rows(model, again, 3))
    assert [row.ids for row in again] == [alone(model, row) for row in again]
    assert [row.ids for row in again] != [row.ids for row in rows]


def test_positions_are_counted_from_0_again_after_many(models, monkeypatch):
    monkeypatch.setattr(decoder_batch, "ROOM", 8)
    monkeypatch.setattr(decoder_batch, "FAR", 30)
    rows = make_rows(12, lengths=(2, 5, 9), tokens=(5, 19, 30))
    moved = []
    rotated_back = decoder_batch.rotated_back
    monkeypatch.setattr(
        decoder_batch, "rotated_back", lambda *args: moved.append(1) or rotated_back(*args)
    )
    list(generate_rows(models["scaled"], rows, 3))
    assert moved
    assert [row.ids for row in rows] == [alone(models["scaled"], row) for row in rows]


def test_a_long_prompt_goes_through_the_model_in_pieces(models, monkeypatch):
    monkeypatch.setattr(decoder, "PREFILL_STEP", 32)
    rows = make_rows(5, lengths=(40, 75), tokens=(4,))
    list(generate_rows(models["window"], rows, 5))
    assert [row.ids for row in rows] == [alone(models["window"], row) for row in rows]


def test_a_row_that_ends_early_leaves_its_slot_to_another(models):
    model = models["grouped heads"]
    rows = [Row([i + 5], 12) for i in range(6)]
    expected = [alone(model, row) for row in rows]
    for row, ids in zip(rows, expected, strict=True):
        row.end = ids[3]
    list(generate_rows(model, rows, 2))
    for row, ids in zip(rows, expected, strict=True):
        assert row.ids == ids[: ids.index(row.end) + 1]


def test_random_numbers_of_a_row_are_its_own(models):
    sampling = Sampling(temp=1.0, top_p=0.9, repetition_penalty=1.3)

    def answers(n_slots):
        mx.random.seed(5)
        rows = make_rows(9, tokens=(3, 11))
        list(generate_rows(models["grouped heads"], rows, n_slots, sampling, 250))
        return [row.ids for row in rows]

    together = answers(9)
    assert answers(9) == together == answers(2)
    assert max(max(ids) for ids in together) < 250
    assert together != [row.ids for row in make_rows(9)]


def test_prompts_of_about_one_length_go_through_the_model_together():
    assert list(group_sizes([3, 3, 4, 9, 9, 9, 9, 40], 36)) == [3, 4, 1]
    assert list(group_sizes([2, 9], 36)) == [2]  # too few for a group of their own
    assert list(group_sizes([], 36)) == []


def test_logits_that_are_not_finite_are_an_error():
    model = Model(ModelArgs(**SMALL))
    model.norm.weight = model.norm.weight * mx.nan
    with pytest.raises(FloatingPointError, match="--dtype"):
        list(generate_rows(model, make_rows(2), 2))


def test_as_many_rows_as_their_cache_is_no_larger_than_the_weights(models):
    model = models["grouped heads"]
    n_bytes = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    a_token = 2 * 2 * 2 * 16 * 4  # keys and values of two layers, two heads, float32
    assert rows_that_fit(model, 100) == n_bytes // (256 * a_token) > 1
    assert rows_that_fit(model, 10**9) == 1
    wide = Model(ModelArgs(**{**SMALL, "vocab_size": 20000}))
    assert rows_that_fit(wide, 5) == 64


# -------------------------------------------------------------------------------------------------
# Files of prompts


def contents(tmp_path, text):
    (tmp_path / "prompts").write_text(text, "utf-8")
    return [prompt.content for prompt in read_prompts(str(tmp_path / "prompts"))]


def test_a_file_holds_objects_of_each_kind_or_lines_of_text(tmp_path):
    assert contents(tmp_path, '{"prompt": "a\\nb", "completion": "c"}\n\n{"prompt": ""}\n') == [
        "a\nb",
        "",
    ]
    assert contents(tmp_path, '{"text": "a"}\n{"text": "b", "n": 1}') == ["a", "b"]
    assert contents(tmp_path, "\ufeffOne {x}\n \n{y}\r\n[INST] {} [/INST]\n") == [
        "One {x}",
        "{y}",
        "[INST] {} [/INST]",
    ]
    user, answer = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    lines = [{"messages": [user, answer]}, {"messages": [user, answer, user], "tools": [{"a": 1}]}]
    first, second = contents(tmp_path, "\n".join(map(json.dumps, lines)))
    assert (first.messages, first.tools) == ([user], None)
    assert (second.messages, second.tools) == ([user, answer, user], [{"a": 1}])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"prompt": "a"}\n{"prompt": 3}', "line 2 has no prompt: its prompt is 3"),
        ('{"prompt": "a"}\n\nb', "line 3 is text, and the first line is a JSON object: give all"),
        ('a\n{b}\n{"n": 1}\n{"prompt": "c"}', "line 4 is a JSON object, and the first line is"),
        ('{\n"prompt": "a"\n}', "line 1 begins a JSON object of many lines"),
        ('{"prompt": "a"', "line 1 is not JSON"),
        ('[{"prompt": "a"}]', "line 1 .* array"),
        ('{"text": "a"}\n{"prompt": "b"}', "line 2 has no text"),
        ('{"messages": []}', "line 1 has no messages"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "line 1 asks nothing"),
        ('{"prompt": "\\ud800"}', "line 1 holds half a character"),
        ("\n \n", "is empty"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, text, problem):
    with pytest.raises(ValueError, match=problem):
        contents(tmp_path, text)


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "prompts").write_bytes(b"a\n\xc3\xa9\r\nb \xff\nc\n")
    with pytest.raises(ValueError, match="prompts, line 3 is not valid UTF-8"):
        read_prompts(str(tmp_path / "prompts"))


def test_a_file_that_is_missing_is_named(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"prompt\.jsonl is no file \(did you mean"):
        read_prompts(str(tmp_path / "prompt.jsonl"))


def test_a_named_pipe_is_read_once():
    end, other = os.pipe()
    os.write(other, b"Alpha\nBeta")
    os.close(other)
    assert [prompt.content for prompt in read_prompts(f"/dev/fd/{end}")] == ["Alpha", "Beta"]
    os.close(end)


# -------------------------------------------------------------------------------------------------
# lora.py --prompts


def answer(model, prompts, *flags):
    """The records that lora.py writes, and its standard error."""
    result = call_script(
        "lora.py", "--model", model, "--no-adapter", "--prompts", prompts, "--temp", "0", *flags
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()], result.stderr


def text_alone(model, prompt, *flags):
    result = call_script(
        "lora.py", "--model", model, "--no-adapter", "--prompt", prompt, "--temp", "0", *flags
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.partition("Generating\n")[2].removeprefix(prompt).removesuffix("\n")


PROMPTS = ["Applies", "A layer of the ReLU function that", "é", "x"]


def test_answers_are_those_of_one_at_a_time_in_the_order_of_the_file(tiny_model, tmp_path):
    (tmp_path / "p.jsonl").write_text(
        "\n".join(json.dumps({"id": i, "prompt": p}) for i, p in enumerate(PROMPTS))
    )
    records, errors = answer(tiny_model, tmp_path / "p.jsonl", "-n", "14", "--batch-size", "2")
    expected = [text_alone(tiny_model, prompt, "-n", "14") for prompt in PROMPTS]
    assert [record["completion"] for record in records] == expected
    assert [(record["id"], record["prompt"]) for record in records] == list(enumerate(PROMPTS))
    assert "4 prompts" in errors
    assert "Total parameters" in errors
    # A text that stops one of them, and stands within it.
    stop = expected[1][3:6]
    stopped, _ = answer(tiny_model, tmp_path / "p.jsonl", "-n", "14", "--stop", stop)
    expected = [text_alone(tiny_model, prompt, "-n", "14", "--stop", stop) for prompt in PROMPTS]
    assert [record["completion"] for record in stopped] == expected
    assert stopped[1]["finish_reason"] == "stop"
    assert stopped[1]["completion"] == records[1]["completion"][:3]


def test_an_answer_may_end_at_once(tiny_model, tmp_path):
    model, tokenizer = lora.load_model(tiny_model)
    folder = write_quick_model(tmp_path / "model", model)
    first = next(generate_step(model, tokenizer.encode("Applies")))
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, "bos_id": 1, "eos_ids": [first]}))
    (tmp_path / "p.txt").write_text("Applies\nA layer\n")
    records, _ = answer(folder, tmp_path / "p.txt", "-n", "3")
    assert records[0] == {"prompt": "Applies", "completion": "", "finish_reason": "stop"}
    assert records[1]["prompt"] == "A layer"


def test_chats_go_through_the_template_and_come_back_with_the_answer(tiny_model, tmp_path):
    messages = [{"role": "user", "content": "Applies"}]
    (tmp_path / "chats").write_text(json.dumps({"messages": messages}))
    flags = "-n", "5", "--chat-template", "chatml"
    (record,), _ = answer(tiny_model, tmp_path / "chats", *flags)
    rendered = "<|im_start|>user\nApplies<|im_end|>\n<|im_start|>assistant\n"
    _, tokenizer = lora.load_model(tiny_model)
    ids = tokenizer.encode(rendered, bos=False, special_tokens=True)
    row = AnswerRow(ids, tokenizer, 5, tokenizer.eos_ids)
    list(generate_rows(lora.load_model(tiny_model)[0], [row], 1))
    reply = {"role": "assistant", "content": row.text()}
    assert record == {"messages": [*messages, reply], "finish_reason": "length"}


def test_prompts_come_from_a_pipe_and_a_reader_that_leaves_ends_the_run(tiny_model):
    command = [sys.executable, ROOT / "lora.py", "--model", tiny_model, "--no-adapter"]
    command += ["--prompts", "-", "-n", "200", "--batch-size", "1"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as process:
        process.stdin.write(b"Applies\n" * 400)
        process.stdin.close()
        assert json.loads(process.stdout.readline())["prompt"] == "Applies"
        process.stdout.close()
        assert process.wait(timeout=60) == 1
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--prompts", "-", "--prompt", "a"], "--prompt and --prompts do not go together"),
        (["--prompts", "none.jsonl"], "none.jsonl is no file"),
        (["--prompts", "none.jsonl", "--max-kv-size", "99"], "--max-kv-size is for"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(tiny_model, flags, problem):
    result = call_script("lora.py", "--model", tiny_model, "--no-adapter", *flags)
    assert result.returncode == 2
    assert problem in result.stderr
    assert len(result.stderr.splitlines()) == 1
