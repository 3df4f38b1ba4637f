"""The next token's distribution, compared with transformers', and texts that end one."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_lora import TOKENIZER, load_tiny
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from parts import device  # before MLX, for its BLAS
from parts.decoder import generate_step
from parts.flags import idle_flags
from parts.sampling import Sampler, Sampling, new_keys, penalized, shaped
from parts.stop_text import until_stop
from parts.tokenizers import stream_text

import mlx.core as mx

import lora

N_IDS = 300

# Each sampler alone, and several at once.
SAMPLINGS = [
    Sampling(temp=1.0),
    Sampling(temp=0.05),
    Sampling(temp=7.5),
    Sampling(temp=1.0, top_k=1),
    Sampling(temp=0.7, top_k=17),
    Sampling(temp=1.0, top_k=N_IDS + 5),
    Sampling(temp=1.0, top_p=0.001),
    Sampling(temp=1.0, top_p=0.5),
    Sampling(temp=2.0, top_p=0.9),
    Sampling(temp=1.0, min_p=0.02),
    Sampling(temp=1.0, min_p=1.0),
    Sampling(temp=1.0, repetition_penalty=1.3),
    Sampling(temp=1.0, repetition_penalty=0.7),
    Sampling(temp=0.8, top_p=0.95, top_k=40, min_p=0.05, repetition_penalty=1.1),
    Sampling(temp=1.5, top_p=0.6, top_k=100, min_p=0.2, repetition_penalty=2.0),
]
NAMES = ["normal", "wide", "ties", "all equal", "left out", "one", "extreme"]

TIED = ["ties", "all equal", "extreme"]


@pytest.fixture(scope="module")
def processors():
    """A function of a Sampling that returns transformers' own list of processors, in its order."""
    size = {"vocab_size": N_IDS, "hidden_size": 8, "intermediate_size": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**size, **heads))

    def theirs(sampling):
        config = GenerationConfig(
            do_sample=True,
            temperature=sampling.temp,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p or None,
            repetition_penalty=sampling.repetition_penalty,
        )
        model._prepare_special_tokens(config, device="cpu")
        return model._get_logits_processor(config, input_ids_seq_length=4)

    return theirs


def some_logits(name):
    """Logits (3, N_IDS), float32, of one kind."""
    random = np.random.default_rng(NAMES.index(name))
    x = random.normal(size=(3, N_IDS)).astype(np.float32) * {"wide": 30, "normal": 3}.get(name, 4)
    if name == "ties":  # such as 16 bits give
        x = np.round(x)
    elif name == "all equal":
        x[:] = -2.5
    elif name == "left out":
        x[random.random(x.shape) < 0.6] = -np.inf
    elif name == "one":
        x[:, 1:] = -np.inf
    elif name == "extreme":
        x[:, ::7], x[:, 5], x[1, 6] = -3e38, 1e30, 1e30
    return x


@pytest.mark.parametrize("on_cpu", [True, False])  # of which each has a sort of its own
@pytest.mark.parametrize("name", NAMES)
def test_distributions_are_those_of_transformers_processors(processors, name, on_cpu, monkeypatch):
    monkeypatch.setattr(device, "ON_CPU", on_cpu)
    logits = some_logits(name)
    ids = np.random.default_rng(0).integers(0, N_IDS, (3, 20))
    ids[:, 3] = ids[:, 4]  # what stands there twice counts once
    for sampling in SAMPLINGS:
        theirs = processors(sampling)(torch.tensor(ids), torch.tensor(logits))
        ours = penalized(mx.array(logits), mx.array(ids), sampling.repetition_penalty)
        ours = shaped(ours, sampling)
        kept, their_kept = np.isfinite(ours), theirs.isfinite().numpy()
        ours, theirs = np.array(mx.softmax(ours, axis=-1)), theirs.softmax(-1).numpy()
        if name in TIED and sampling.top_p < 1:  # where torch sorts equal ones in no sure order
            kept, their_kept, ours, theirs = map(np.sort, (kept, their_kept, ours, theirs))
        assert (kept == their_kept).all(), sampling
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-30, err_msg=str(sampling))


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    sampling = Sampling(temp=0.9, top_p=0.8, repetition_penalty=1.2)
    logits = mx.array(some_logits("normal")[:1, :20])
    sampler = Sampler(sampling, [[3, 4]] * 4000)
    tokens = np.array(sampler(mx.repeat(logits, 4000, axis=0)))
    chances = mx.softmax(shaped(penalized(logits, mx.array([[3, 4]]), 1.2), sampling), axis=-1)
    shares = np.bincount(tokens, minlength=20) / 4000
    np.testing.assert_allclose(shares, np.array(chances)[0], atol=0.03)


@pytest.mark.parametrize("window", [None, 4, 2**40])
def test_the_penalty_counts_the_texts_own_tokens_and_of_those_the_last(window):
    """Each row as it would be alone, with texts of several lengths, one of them replaced."""
    sampling = Sampling(temp=1.0, repetition_penalty=3.0, repetition_window=window)
    random = np.random.default_rng(2)
    texts = [[1, 2, 3, 1, 5, 6, 7], [4], [8, 9]]
    keys = new_keys(4)
    sampler = Sampler(sampling, texts, keys[:3])
    row_keys = list(keys[:3])
    for n in range(9):
        if n == 5:
            sampler.replace(1, [6, 6, 2], keys[3])
            texts[1], row_keys[1] = [6, 6, 2], keys[3]
        logits = mx.array(random.normal(size=(3, 12)).astype(np.float32) * 3)
        tokens = sampler(logits).tolist()
        for row in range(3):
            ids = texts[row] if window is None else texts[row][-window:]
            expected = np.array(logits[row])
            for token in set(ids):
                expected[token] *= 3.0 if expected[token] < 0 else 1 / 3.0
            now, row_keys[row] = mx.random.split(row_keys[row])
            assert tokens[row] == mx.random.categorical(mx.array(expected), key=now).item()
            texts[row] = [*texts[row], tokens[row]]


def test_a_seed_decides_the_tokens(tiny_model):
    model, tokenizer = load_tiny(tiny_model)
    ids = tokenizer.encode("All about llamas")

    def text(seed, sampling):
        mx.random.seed(seed)
        return list(islice(generate_step(model, ids, sampling), 12))

    for sampling in (Sampling(1.0), Sampling(1.0, 0.9, 50, 0.01, 1.2, 8)):
        assert text(3, sampling) == text(3, sampling) != text(4, sampling)


def test_no_token_comes_twice_where_the_penalty_is_high(tiny_model):
    model, tokenizer = load_tiny(tiny_model)
    sampling = Sampling(repetition_penalty=100.0)
    ids = tokenizer.encode("llama llama")
    found = list(islice(generate_step(model, ids, sampling), 40))
    assert len({*ids, *found}) == len(set(ids)) + 40
    again = list(islice(generate_step(model, ids, sampling._replace(repetition_window=2)), 150))
    assert len(set(again)) < 150
    assert all(len(set(again[i : i + 3])) == 3 for i in range(148))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--top-p", "0"), "'0' is not a number above 0 and up to 1"),
        (("--top-p", "nan"), "'nan' is not a number above 0 and up to 1"),
        (("--top-k", "-1"), "'-1' is not a whole number of at least 0"),
        (("--min-p", "1.5"), "'1.5' is not a number from 0 to 1"),
        (("--repetition-penalty", "0"), "'0' is not a number from 0.01 to 100"),
        (("--repetition-window", "0"), "'0' is not a whole number of at least 1"),
        (("--stop", ""), "'' is no text"),
        (("--stop", "a\udcff"), r"'a\udcff' is not UTF-8"),
    ],
)
def test_a_value_out_of_its_range_is_one_line(flags, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        lora.build_parser().parse_args(["--prompt", "hi", *flags])
    assert f"error: argument {flags[0]}: {says}; see " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        (["--prompt", "a", "--top-p", "0.9", "--repetition-penalty", "2", "--stop", "b"], []),
        (["--chat", "--temp", "0", "--top-k", "9", "--stop", "b"], ["--top-k"]),
        (
            ["--prompts", "f", "--repetition-window", "9", "--pack"],
            ["--repetition-window", "--pack"],
        ),
        (["--train", "--pack", "--mask-prompt", "--min-p", "0.1"], ["--min-p"]),
        (["--prompt", "a", "--mask-prompt"], ["--mask-prompt"]),
    ],
)
def test_a_flag_that_changes_nothing_is_named(flags, idle):
    args = lora.build_parser().parse_args(flags)
    assert [problem.split()[0] for problem in idle_flags(args)] == idle


# -------------------------------------------------------------------------------------------------
# Texts that end one

LETTERS = st.text("ab🦙", max_size=12)


@given(st.lists(LETTERS), st.lists(LETTERS.filter(bool), max_size=3))
def test_a_text_ends_before_the_first_stop_text_however_it_is_cut(pieces, stops):
    text = "".join(pieces)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    taken = iter(pieces)
    assert "".join(until_stop(taken, stops)) == expected
    if ends:  # no more pieces were taken than hold the stop text
        assert len(text) - sum(map(len, taken)) < min(ends)[0] + max(map(len, pieces))


def test_a_text_that_may_yet_end_is_held_back_and_no_more():
    shown = list(until_stop(iter(["Hi", " <|", "x <", "|im", "_end|>!"]), ["<|im_end|>"]))
    assert shown == ["Hi", " ", "<|x ", "", ""]
    assert list(until_stop(iter(["a\n", "\n", "b"]), ["\n\nQ"]))[:2] == ["a", ""]


@pytest.mark.parametrize("stop", ["ll🦙m", "🦙", "é is", "s\n"])
def test_a_stop_text_spans_tokens_and_bytes(stop):
    text = "Wé say ll🦙mas, that it é is\nso"
    ids = TOKENIZER.encode(text)[1:]
    pieces = stream_text(iter(ids), TOKENIZER, TOKENIZER.encode("So:"))
    expected, found, _ = f" {text}".partition(stop)
    assert found or stop == "s\n"
    assert "".join(until_stop(pieces, [stop])) == expected
