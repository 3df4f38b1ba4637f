"""Teach a Llama, Mistral or Qwen model your own texts with LoRA or QLoRA, test it, and generate.

python lora.py --model mlx_model --data mlx-doc-data --train --iters 600
python lora.py --model mlx_model --data mlx-doc-data --test
python lora.py --model mlx_model --prompt "Q: What is ReLU in mlx?"
python lora.py --model mlx_model --prompts questions.jsonl > answers.jsonl
cat question.txt | python lora.py --model mlx_model --prompt -
python lora.py --model mlx_model --chat

The model is a folder that convert.py made; when it is quantized, training is QLoRA. The data is a
folder with train.jsonl, valid.jsonl and test.jsonl, one {"text": "..."} a line, or prompts or
chats. LoRA makes x W of some layers x W + 2 (x A) B: W stays as it is, A and B are trained
(`LoRALinear` in models.py).
"""

from parts import python_version  # noqa: F401  before what an older Python lacks

import argparse
import itertools
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from parts import adapters, cli, device, dropout, model_folder, run_log  # before MLX
from parts.adapter_formats import read_matrices
from parts.adapters import to_vector
from parts.answers import Answer, ready_to_answer, warn_of_length
from parts.batch_generation import answer_prompts, answers_alone
from parts.batches import bucket_lengths, pad_batch
from parts.chat import ChatTemplate, open_template
from parts.cli import USER_ERRORS, did_you_mean, warn
from parts.files import check_content
from parts.flags import BATCHES, COUNT, EPOCHS, LENGTH, RATE, SEED, TEMPERATURE
from parts.flags import adapter_to_load, add_asking_flags, add_batch_size, add_data_flags
from parts.flags import add_lora_flags, add_sampling_flags, add_update_flags, check_arguments
from parts.interrupts import Interrupts, Stopped
from parts.ops import cross_entropy, linear_cross_entropy
from parts.packing import make_packing, packed_batches
from parts.prompt_file import has_chats
from parts.ranks import SINGLE, Ranks, input_digests, launched_rank
from parts.records import Record, Records
from parts.run_files import warn_of_replaced
from parts.run_log import StepResult, say
from parts.schedules import count_updates, make_optimizer
from parts.save_and_resume import NotSaved, recover_interrupted_save
from parts.steps import accumulated, make_start_step
from parts.talk import converse
from parts.token_rows import TokenRows, encode_records, special_token_warning, try_template
from parts.tokenizers import Tokenizer
from parts.training_layers import layers_in_evaluation, layers_in_training
from parts.training import (
    report_steps,
    report_validation,
    start_run,
    validate_at_start,
    what_is_due,
)

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from models import Model, ModelArgs, add_lora, quantizable, top_layers  # and the LoRA layer

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

# -------------------------------------------------------------------------------------------------
# Arguments


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script's flags, each documented next to its default."""
    parser = cli.Parser(__doc__)
    parser.set_defaults(rows=None)  # of a batch of prompts, which --batch-size sets
    add = parser.add_argument_group("what to do (at least one)").add_argument
    add("--train", action="store_true", help="train adapters")
    add("--test", action="store_true", help="compute the loss on the test set")
    add("--prompt", "-p", help="generate text that continues this; - reads it")
    add_asking_flags(add)

    add = parser.add_argument_group("model").add_argument
    add("--model", default="mlx_model", help="folder made by convert.py")
    add(
        "--adapter-file",
        default="adapters.npz",
        help="adapters to write, or to use: then also a folder of PEFT's or mlx-lm's; training "
        "also writes adapters.best.npz, those of the lowest validation loss",
    )
    add("--no-adapter", action="store_true", help="test or generate with the base model")
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="type to compute in; auto is float32 on a CPU and bfloat16 on a GPU, but float16 to "
        "generate on an M1 or M2",
    )
    add("--seed", type=SEED, default=0, help="seed of all random numbers")
    add(
        "--special-tokens",
        action="store_true",
        help="read special tokens, such as </s>, where texts and prompts name them; else that is "
        "text",
    )

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--data", default="data/", help="folder of train.jsonl, valid.jsonl, test.jsonl")
    add_data_flags(add)
    add("--lora-layers", type=COUNT, default=16, help="layers to adapt, from the top")
    add_lora_flags(add)
    add_batch_size(add)
    duration = training.add_mutually_exclusive_group().add_argument
    duration("--iters", type=COUNT, default=1000, help="updates to train in all")
    duration("--epochs", type=EPOCHS, help="passes over the data, in place of --iters")
    add("--learning-rate", type=RATE, default=1e-5, help="Adam's learning rate")
    add_update_flags(add)
    add("--grad-checkpoint", action="store_true", help="less memory, a third more time")
    add("--max-seq-length", type=LENGTH, default=2048, help="tokens of a text at most")
    add(
        "--resume-adapter-file",
        help="adapters to resume from, where they were saved; or the start of a new run, if no "
        "state lies next to them, or if they are a folder of PEFT's or mlx-lm's",
    )
    add("--steps-per-report", type=COUNT, default=10, help="steps between two reports")
    add("--steps-per-eval", type=COUNT, default=200, help="steps between two validations")
    add("--save-every", type=COUNT, default=100, help="steps between two saves")

    add = parser.add_argument_group("evaluation").add_argument
    add("--val-batches", type=BATCHES, default=25, help="batches a validation, -1: all")
    add("--test-batches", type=BATCHES, default=500, help="batches of the test, -1: all")

    add = parser.add_argument_group("generation").add_argument
    add("--num-tokens", "-n", type=COUNT, default=100, help="tokens to generate at most")
    add("--write-every", type=COUNT, default=1, help="tokens between two writes")
    add("--temp", type=TEMPERATURE, default=0.8, help="sampling temperature, 0: greedy")
    add_sampling_flags(add)
    return parser


# -------------------------------------------------------------------------------------------------
# Data


class Dataset:
    """The records of a JSONL file: texts, which stand under `key`, or what else parts/records.py
    reads.

    mask_prompt: whether the loss counts completions and the assistant's answers alone.
    chat_template: in place of the model's own. Raises FileNotFoundError, or ValueError with the
    file and the line that is wrong.
    """

    def __init__(
        self,
        path: str | Path,
        key: str = "text",
        mask_prompt: bool = False,
        chat_template: str | None = None,
    ):
        if not Path(path).is_file():
            what = "is no file" if os.path.lexists(path) else f"is missing{did_you_mean(path)}"
            raise FileNotFoundError(
                f"{path} {what}: --data takes a folder with train.jsonl, "
                "valid.jsonl and test.jsonl, such as cwk_create_dataset.py makes"
            )
        check_content(path)
        self._records = Records(path, key)
        if mask_prompt and self._records.kind == "text":
            raise ValueError(f"--mask-prompt is for prompts or chats, and {path} holds texts")
        self._options = mask_prompt, chat_template
        self._kept = np.arange(len(self._records))  # all but those of which nothing counts
        self.left_out: list[str] = []  # of which nothing counts: where they stand, and why
        self._encoded: tuple[Tokenizer, TokenRows] | None = None

    def __getitem__(self, index: int) -> Record:
        return self._records[self._kept[index]]

    def __len__(self) -> int:
        return len(self._kept)

    def encode(self, tokenizer: Tokenizer) -> TokenRows:
        """Return the token ids of each record, and which of them count. Computed once.

        Of a record of which nothing counts there is none. Raises ValueError where no other is left,
        and for one that leaves nothing to predict.
        """
        if self._encoded is None or self._encoded[0] is not tokenizer:
            self._kept, self.left_out = np.arange(len(self._records)), []
            rows = encode_records(self._records, tokenizer, *self._options)
            self._keep(tokenizer, rows, "nothing in it is an answer")
        return self._encoded[1]

    def try_template(self, tokenizer: Tokenizer) -> None:
        """Raise what `encode` would for the first record, if it is a chat."""
        try_template(self._records, tokenizer, *self._options)

    def truncate(self, tokenizer: Tokenizer, max_length: int) -> int:
        """Shorten the texts of more than `max_length` tokens. Return how many they are."""
        rows = self.encode(tokenizer)
        why = f"its answer begins after {max_length} tokens, see --max-seq-length"
        self._keep(tokenizer, rows.truncated(max_length), why)
        return int((rows.lengths > max_length).sum())

    def _keep(self, tokenizer: Tokenizer, rows: TokenRows, why: str) -> None:
        which = rows.where_counting()
        dropped = np.setdiff1d(self._kept, self._kept[which])
        self.left_out += [f"{self._records.place(i)}: {why}" for i in dropped]
        if not len(which):
            raise ValueError(f"nothing counts in any record, as in {self.left_out[-1]}")
        self._kept = self._kept[which]
        self._encoded = tokenizer, rows.chosen(which)


def load(args: argparse.Namespace) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """Return the training, validation and test set of `args.data`; None for one not needed, and
    where there is no validation set.

    Raises FileNotFoundError or ValueError when a set that is needed is missing or malformed.
    """
    folder, options = Path(args.data), (args.mask_prompt, args.chat_template)
    train_set = Dataset(folder / "train.jsonl", "text", *options) if args.train else None
    validates = args.train and (
        os.path.lexists(folder / "valid.jsonl") or args.patience is not None
    )
    val_set = Dataset(folder / "valid.jsonl", "text", *options) if validates else None
    test_set = Dataset(folder / "test.jsonl", "text", *options) if args.test else None
    return train_set, val_set, test_set


def truncate(sets: list[Dataset], tokenizer: Tokenizer, max_length: int) -> None:
    """Shorten the sets' texts of more than `max_length` tokens, and warn of what is lost."""
    n_truncated = sum(dset.truncate(tokenizer, max_length) for dset in sets)
    if n_truncated:
        warn(f"{n_truncated} texts are cut to {max_length} tokens, see --max-seq-length")
    left_out = [where for dset in sets for where in dset.left_out]
    if left_out:
        are = f"{len(left_out)} records are" if len(left_out) > 1 else "a record is"
        warn(f"{are} left out, of which --mask-prompt lets nothing count ({left_out[0]})")


# -------------------------------------------------------------------------------------------------
# Loss and evaluation


def loss(
    model: Model,
    inputs: mx.array,
    targets: mx.array,
    lengths: mx.array,
    positions: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Return the mean cross-entropy in nats over the targets that count, and their number.

    Every token of a text counts, a question's too, up to EOS; padding does not.
    inputs, targets: (B, L), of packed rows inputs (B, L, 2); lengths: (B,), the targets of a row
    that count, from its first on, except negative ones. Where none counts, both are 0. positions:
    (B, P), where few count, the positions of `targets`, then (B, P) too; the others cost no logits
    (`batches.keep_targets`).
    """
    targets = mx.where(mx.arange(targets.shape[1]) < lengths[:, None], targets, -1)
    in_blocks = hasattr(model, "hidden")  # else any model that returns logits
    x, _ = model.hidden(inputs) if in_blocks else model(inputs)  # (B, L, D) or (B, L, V)
    if positions is not None:
        x = mx.take_along_axis(x, positions[..., None], 1)
    if in_blocks:
        losses = linear_cross_entropy(x, model.output_weight, targets, model.training)
    else:
        losses = cross_entropy(x, targets)
    n_tokens = (targets >= 0).sum()
    return losses.sum() / mx.maximum(n_tokens, 1), n_tokens


def iterate_batches(
    dset: Dataset,
    tokenizer: Tokenizer,
    batch_size: int,
    train: bool = False,
    seed: int = 0,
    skip: int = 0,
    pack: int | None = None,
) -> Iterator[tuple[mx.array, ...]]:
    """Yield batches of sequences of similar length, in a random order that `seed` decides.

    A batch is inputs (B, L), targets (B, L), which are the inputs one position on, and lengths
    (B,), how many of a row's targets count; all int32, L one of few lengths. Where prompts are
    masked, the targets that do not count are -1, or left out: a fourth array then holds the others'
    positions, for `loss`. Evaluation is one pass over all records. Training never ends; an epoch's
    order depends on `seed` and the epoch alone, and what does not fill a batch is left out, other
    records in each epoch. The first `skip` batches are left out. With `pack`, for training, texts
    share rows (`packed_batches`): a batch has as many tokens as `batch_size` rows of `pack`.
    """
    rows = dset.encode(tokenizer)
    if pack is not None:
        yield from packed_batches(rows, batch_size, pack, seed, skip)  # for ever
    padded = bucket_lengths(rows.lengths)
    batch_size = min(batch_size, len(rows))
    epochs_done, skip = divmod(skip, len(rows) // batch_size) if train else (0, skip)
    for epoch in itertools.count(epochs_done):
        # Choose the epoch's records: in training, as many as fill batches.
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(rows))
        if train:
            order = order[: len(rows) - len(rows) % batch_size]
        # Make batches of records of similar length, and put the batches in random order.
        order = order[np.argsort(padded[order], kind="stable")]
        starts = rng.permutation(np.arange(0, len(order), batch_size))
        for start in starts[skip if epoch == epochs_done else 0 :]:
            chosen = order[start : start + batch_size]
            yield pad_batch([rows[i] for i in chosen], padded[chosen[-1]], rows.masked)
        if not train:
            return


def evaluate(
    model: Model,
    dataset: Dataset,
    loss: Callable,
    tokenizer: Tokenizer,
    batch_size: int,
    num_batches: int,
    streams: list[mx.Stream] | None = None,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = SINGLE,
) -> float | None:
    """Return the mean loss a token, in nats, over `num_batches` batches of `dataset`; -1 takes
    every record, once.

    The rows of a batch are split among the ranks, and among `streams`, by default new ones. When
    `stop` returns true on any rank, it ends after the batch in hand, and returns None.
    """
    total_loss, total_tokens = 0.0, 0
    n_all = math.ceil(len(dataset) / batch_size)
    n_batches = n_all if num_batches == -1 else min(num_batches, n_all)
    batches = itertools.islice(iterate_batches(dataset, tokenizer, batch_size), n_batches)
    streams = streams or device.open_streams(batch_size // ranks.size, ranks.local_size)
    with device.limits_restored(), without_training(model):
        layers = layers_in_evaluation(model, loss)
        compute = device.bounded(partial(layers.losses, streams, ranks), [], queues=False)
        for batch in tqdm(batches, "Evaluating", n_batches, leave=False, disable=None):
            # Compute this rank's rows.
            results = compute(*batch)
            mx.eval(results)
            batch_loss = sum(mean.item() * n_tokens.item() for mean, n_tokens in results)
            batch_tokens = sum(n_tokens.item() for _, n_tokens in results)
            # Add those of all ranks, and whether one wants to stop.
            batch_loss, batch_tokens, stopping = ranks.sum_values(batch_loss, batch_tokens, stop())
            total_loss += batch_loss
            total_tokens += batch_tokens
            if stopping:
                return None
    return total_loss / max(total_tokens, 1)


@contextmanager
def without_training(model: nn.Module) -> Iterator[None]:
    """Meanwhile, the model computes no more than losses."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# -------------------------------------------------------------------------------------------------
# Training


def make_step(
    model: Model,
    optimizer: optim.Optimizer,
    loss: Callable,
    streams: list[mx.Stream],
    ranks: Ranks = SINGLE,
    max_grad_norm: float | None = None,
) -> Callable[..., StepResult]:
    """Return a function that trains on a batch: `step(inputs, targets, lengths, stopping=False)`.

    It splits the batch's rows among ranks and `streams`, and weighs gradients by tokens. Where loss
    or gradients are not finite, it changes nothing. Its result is still being computed when it
    returns, so that the next batch is made meanwhile. It starts from the matrices and moments that
    model and optimizer have now, which it updates. With `last=False` it makes no update: the next
    call's is that of both batches as one.

    max_grad_norm: scales gradients down to this norm, over all matrices, where it is above.
    """
    layers = layers_in_training(model, loss)
    vector = {"lora": to_vector(model.trainable_parameters())}
    optimizer.init(vector)
    state = [optimizer.state, vector, *layers.state]
    n_values = vector["lora"].size

    def weighted(result: tuple) -> mx.array:  # the gradient, the loss, and 1: (n_values + 2,)
        (value, n_tokens), gradient = result
        return mx.concatenate([gradient, mx.stack([value, mx.array(1.0)])]) * n_tokens

    def sum_rows(stopping: mx.array, *batch: mx.array) -> mx.array:  # (n_values + 3,), float32
        matrices = model.trainable_parameters()
        results = layers.on_each_stream(streams, vector["lora"], batch, ranks)
        model.update(matrices)  # for which the gradients leave what they traced
        total = sum(map(weighted, results)) if results else mx.zeros(n_values + 2)
        return mx.concatenate([total, stopping[None]])

    def update(total: mx.array) -> tuple[mx.array, ...]:
        n_tokens, stopping = total[-2], total[-1]
        divisor = mx.maximum(n_tokens, 1)  # nothing counts in a batch: nothing changes
        gradient, value = total[:-3] / divisor, total[-3] / divisor
        # Anything that is not finite makes the sum so, and then all stays as it was.
        finite = mx.isfinite(total.sum()) & (n_tokens > 0)
        if max_grad_norm is not None:
            gradient, _ = optim.clip_grad_norm(gradient, max_grad_norm)
        moments = tree_map(lambda value: value, optimizer.state)
        after = optimizer.apply_gradients({"lora": gradient}, vector)
        keep, rate = partial(mx.where, finite), optimizer.learning_rate
        vector.update(tree_map(keep, after, vector))
        layers.put(vector["lora"])
        optimizer.state.update(tree_map(keep, optimizer.state, moments))
        return value, n_tokens, finite, stopping, rate

    start_step = make_start_step(sum_rows, update, state, layers.outputs, ranks)

    def step(*batch: mx.array, **options: bool) -> StepResult | mx.array:
        result = start_step(*layers.prepare(*batch), **options)
        layers.finish_step()
        return result

    return device.bounded(step, state)


def train(
    model: Model,
    train_set: Dataset,
    val_set: Dataset | None,
    optimizer: optim.Optimizer,
    loss: Callable,
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    ranks: Ranks = SINGLE,
) -> None:
    """Train what is not frozen up to step `args.iters`; report, validate and save on the way.

    Adapters go to `args.adapter_file`, with the state that resuming needs next to them. Each rank
    takes its rows of a batch, and all make the same update; rank 0 alone reports and saves.
    Raises NotSaved when the last save failed; else, after saving, Stopped at a signal and
    FloatingPointError when training has broken down; RuntimeError when the device fails.
    """
    streams = device.open_streams(args.batch_size // ranks.size, ranks.local_size)
    state, log = start_run(model, train_set.encode(tokenizer), optimizer, args, ranks)
    meter, done = state.meter, state.meter.iteration
    step = make_step(model, optimizer, loss, streams, ranks, args.max_grad_norm)
    skip = done * args.grad_accumulation
    pack = args.max_seq_length if args.pack else None
    options = {"train": True, "seed": args.seed, "skip": skip, "pack": pack}
    batches = iterate_batches(train_set, tokenizer, args.batch_size, **options)
    batches = dropout.add_keys(batches, args.lora_dropout, args.seed, skip)
    update = accumulated(step, batches, args.grad_accumulation)
    iterations = range(done + 1, args.iters + 1)
    bar = tqdm(iterations, "Training", total=args.iters, initial=done, disable=None)
    with Interrupts(ranks) as interrupts, device.limits_restored(), state.saved_on_failure(), log:
        compute = partial(
            evaluate, model, val_set, loss, tokenizer, args.batch_size, args.val_batches, streams,
            stop=interrupts.pending, ranks=ranks,
        )  # fmt: skip
        validate = partial(report_validation, compute, state, log, interrupts, args.patience, bar)
        gives_up = val_set is not None and validate_at_start(validate, state, log, args)
        meter.resume()
        for iteration in [] if gives_up else bar:
            # Step. The device computes it while the next batch is made.
            meter.add(update(stopping=interrupts.pending()))
            interrupts.agree(meter.previous)

            # Once in a while, wait for the device. What follows does not count as the steps' time.
            due = what_is_due(iteration, args, interrupts.stopping)
            if not any(due):
                continue
            mx.eval(meter.steps, model.trainable_parameters(), optimizer.state)
            meter.pause()

            # Report the steps since the last report.
            if due.report:
                report_steps(state, log, bar)
            state.keep()

            # Validate, which may end a training that no longer becomes better.
            gives_up = val_set is not None and due.validate and validate()

            # Save, also a new best, and where the training ends early.
            ends = interrupts.stopping or meter.broken or gives_up
            if due.save or state.has_new_best or ends:
                state.save()
            if ends:
                break
            meter.resume()
        interrupts.settle()
    state.check_saved()
    meter.check_finite()
    interrupts.check(meter.iteration)
    model.grad_checkpoint = False
    say(f"Peak memory {device.peak_memory() / 1e9:.3f} GB")


# -------------------------------------------------------------------------------------------------
# Generation


def generate(model: Model, prompt: str, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Write the prompt and up to `args.num_tokens` tokens that follow it to standard output, and
    how fast that was to standard error.
    """
    prompt_ids = tokenizer.encode(prompt)
    warn_of_length(len(prompt_ids), model)
    print(prompt, end="", flush=True)
    with ready_to_answer():
        answer = Answer(model, tokenizer, prompt_ids, args)
        for piece in answer:
            print(piece, end="", flush=True)
    print(flush=True)
    print(answer.summary(), file=sys.stderr)


# -------------------------------------------------------------------------------------------------
# Loading


def load_model(
    folder: str | Path, dtype: mx.Dtype | None = None, special_tokens: bool = False
) -> tuple[Model, Tokenizer]:
    """Return the model and the tokenizer that convert.py wrote into `folder`.

    Floating-point weights are cast to `dtype`, by default the device's. special_tokens: whether the
    tokenizer reads those that texts name.
    Raises FileNotFoundError or ValueError when a file is missing, malformed or does not fit, and
    MemoryError when the memory does not hold the weights.
    """
    model, tokenizer = open_model(folder, special_tokens)
    model_folder.load_weights(model, Path(folder) / "weights.npz", dtype or device.default_dtype())
    return model, tokenizer


def open_model(folder: str | Path, special_tokens: bool = False) -> tuple[Model, Tokenizer]:
    """Return the model as `load_model` does, without its weights, and the tokenizer."""
    kinds = Model, ModelArgs, quantizable
    return model_folder.open_empty(Path(folder), *kinds, special_tokens)


def load_adapter(
    model: Model, path: str | Path, ranks: Ranks = SINGLE, dropout: float = 0.0
) -> None:
    """Wrap the layers that rank 0's adapter file or folder names, and put its matrices into them.

    Raises OSError, or ValueError, which names the file and the key, when it does not fit the model.
    """
    matrices, scale = read_matrices(path, model.args.head_dim, ranks.read)
    for what in adapters.adapted_layers(matrices, len(model.layers), path):
        add_lora(model, *what, scale, dropout)
    adapters.put_matrices(model, matrices, path)


# -------------------------------------------------------------------------------------------------
# The run


def run(args: argparse.Namespace, ranks: Ranks = SINGLE) -> None:
    """Do what the flags ask for, in the order train, test, generate."""
    device.limit_command_buffers(training=args.train or args.test)
    mx.random.seed(args.seed)
    np.random.seed(args.seed)
    if device.has_slow_blas():
        warn("MLX runs on its own, slow BLAS; on x86-64 Linux, pip install mkl")
    if args.resume_adapter_file and ranks.rank == 0:
        recover_interrupted_save(args.resume_adapter_file)
    sets, model, tokenizer, template = prepare(args, ranks)
    train_set, val_set, test_set = sets
    adapter = adapter_to_load(args)
    if adapter is not None:
        load_adapter(model, adapter, ranks, args.lora_dropout)
    elif args.train:
        what = args.lora_projections, args.lora_rank, args.lora_scale, args.lora_dropout
        add_lora(model, top_layers(model, args.lora_layers), *what)
    say(f"Total parameters {model_folder.count_parameters(model) / 1e6:.3f}M")
    if args.train:
        n_trainable = sum(v.size for _, v in tree_flatten(model.trainable_parameters()))
        say(f"Trainable parameters {n_trainable / 1e6:.3f}M")

    used = [dset for dset in sets if dset is not None]
    if used:
        say("Loading datasets")
    named = filter(None, [dset.encode(tokenizer).named for dset in used])
    prompt = "" if args.chat else args.prompt or ""
    warning = special_token_warning([(prompt, "--prompt")], tokenizer, named)
    if warning:
        warn(warning)
    truncate(used, tokenizer, args.max_seq_length)
    if args.train:
        rows = train_set.encode(tokenizer)
        sizes = args.batch_size, args.max_seq_length
        packing = make_packing(rows.lengths, *sizes) if args.pack else None
        if len(rows) < args.batch_size or (packing and packing.n_rows == packing.batch_rows):
            warn(f"a batch is {len(train_set)} texts, since there are no more for training")
        if val_set is None:
            warn(f"there is no {Path(args.data) / 'valid.jsonl'}: nothing is validated")
        say("Training")
        if ranks.rank == 0:
            warn_of_replaced(args.adapter_file, args.resume_adapter_file)
        args.iters = count_updates(args, len(rows), packing)
        run_log.announce(model, rows, len(val_set or ()), args, ranks.size, packing)
        train(model, train_set, val_set, make_optimizer(args), loss, tokenizer, args, ranks)
    if args.test:
        say("Testing")
        test_loss = evaluate(
            model, test_set, loss, tokenizer, args.batch_size, args.test_batches, ranks=ranks
        )
        perplexity = math.inf if test_loss > 709 else math.exp(test_loss)  # float64 holds no more
        say(f"Test loss {test_loss:.3f}, Test ppl {perplexity:.3f}.")
    mx.random.seed(args.seed)  # the text depends on it alone, not on what came before
    if args.prompts is not None and ranks.rank == 0:
        say("Generating")
        answer_prompts(model, tokenizer, args, template)
    elif args.chat and ranks.rank == 0:
        converse(model, tokenizer, template, args)
    elif args.prompt is not None and ranks.rank == 0:
        say("Generating")
        generate(model, args.prompt, tokenizer, args)


def prepare(
    args: argparse.Namespace, ranks: Ranks
) -> tuple[tuple[Dataset | None, ...], Model, Tokenizer, ChatTemplate | None]:
    """Return the data sets, the model, the tokenizer and, to ask, the chat template, on each rank.

    Raises ValueError, on all ranks, where that fails on one, or where they are not the same.
    """
    prepared, problem, inputs = (), None, {}
    try:
        check_arguments(args, ranks.size, writes=ranks.rank == 0)
        sets = load(args)  # before the model, since a mistake there shows at once
        say("Loading pretrained model")
        generating = not (args.train or args.test)
        dtype = DTYPES.get(args.dtype) or device.default_dtype(generating)
        model, tokenizer = open_model(args.model, args.special_tokens)
        for dset in filter(None, sets):  # before the weights, which may take long
            dset.try_template(tokenizer)
        folder, template = Path(args.model), None
        if args.chat or has_chats(args.prompts):
            template = open_template(args.chat_template, folder, tokenizer)
        if args.prompt is not None and not tokenizer.encode(args.prompt):
            raise ValueError("--prompt is empty, and no token begins this model's texts: give some")
        model_folder.load_weights(model, folder / "weights.npz", dtype)
        prepared = sets, model, tokenizer, template
        if ranks.size > 1:
            digests = [dset and dset.encode(tokenizer).digest() for dset in sets]
            inputs = input_digests(args, digests)
    except USER_ERRORS as error:
        if ranks.size == 1:
            raise
        problem = str(error)
    if ranks.size > 1:
        ranks.check_same(problem, inputs)
    return prepared


def resuming_command(args: argparse.Namespace) -> str:
    """Return the command line of this run, resumed from what it has saved."""
    flags = [*sys.argv[1:], "--resume-adapter-file", args.adapter_file]  # of two, the last counts
    return shlex.join(["python", sys.argv[0], *flags])


# How a run ends on all ranks together.
COMMON_ENDS = (*USER_ERRORS, Stopped, FloatingPointError, NotSaved, SystemExit, KeyboardInterrupt)


def main() -> None:
    cli.open_closed_streams()
    with cli.exit_statuses(device.advice):
        if launched_rank():  # for all ranks but the first
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  open to the end
        try:
            with Ranks.join(COMMON_ENDS) as ranks:
                args = build_parser().parse_args()
                with answers_alone(args):
                    run(args, ranks)
        except Stopped as stop:
            cli.leave(128 + stop.signum, f"{stop}; resume with: {resuming_command(args)}")


if __name__ == "__main__":
    main()
