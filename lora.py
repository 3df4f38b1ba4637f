"""Teach a Llama or Mistral model your own texts with LoRA or QLoRA, test it, and generate.

python lora.py --model mlx_model --data mlx-doc-data --train --iters 600
python lora.py --model mlx_model --data mlx-doc-data --test
python lora.py --model mlx_model --prompt "Q: What is ReLU in mlx?"
cat question.txt | python lora.py --model mlx_model --prompt -

The model is a folder that convert.py made; when it is quantized, training is QLoRA. The data is a
folder with train.jsonl, valid.jsonl and test.jsonl, one {"text": "..."} a line.
"""

from parts import python_version  # noqa: F401  before what an older Python lacks

import argparse
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import socket
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from parts import cli, device  # before MLX, for its BLAS
from parts.cli import USER_ERRORS, did_you_mean, warn
from parts.device import available_cores, check_memory, open_streams, set_portions
from parts.decoder import generate_step
from parts.files import check_content, decode_text, is_safetensors
from parts.ops import cross_entropy
from parts.records import parse_record
from parts.run_files import PLOT_TITLE, find_siblings, parse_entry, sibling

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

from models import LoRALinear, Model, ModelArgs

LORA_PROJECTIONS = ("wq", "wv")
LORA_RANK = 8
BROKEN_STEPS = 3  # so many in a row that are not finite end the training
ADAPTER_KEY = re.compile(
    rf"layers\.(0|[1-9]\d{{0,3}})\.attention\.({'|'.join(LORA_PROJECTIONS)})\.lora_[ab]"
)
FOREIGN_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth")  # of other tools' formats
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")  # mlx.launch sets the one, mpirun the other
MEETING, JOINING = 20, 30  # seconds in which all ranks have to be there, and MLX to connect them
WELCOME, GOODBYE = b"welcome", b"goodbye"
PADDING = 0.045  # the share of a padded length by which the next shorter one is shorter, at least

# -------------------------------------------------------------------------------------------------
# Arguments


def build_parser() -> argparse.ArgumentParser:
    """The flags of this script, each documented beside its default."""
    count = cli.number(int, lambda n: 1 <= n <= sys.maxsize, "a whole number of at least 1")
    length = cli.number(int, lambda n: n >= 2, "a whole number of at least 2")
    batches = cli.number(
        int, lambda n: n == -1 or n >= 1, "a whole number of at least 1, or -1 for all"
    )
    temperature = cli.number(float, lambda t: t >= 0, "a number of at least 0")
    rate = cli.number(float, lambda r: r > 0, "a number above 0")
    seed = cli.number(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 2**32 - 1")

    parser = cli.Parser(__doc__)
    add = parser.add_argument_group("what to do (at least one)").add_argument
    add("--train", action="store_true", help="train adapters")
    add("--test", action="store_true", help="compute the loss on the test set")
    add("--prompt", "-p", help="generate text that goes on from this; - reads it")

    add = parser.add_argument_group("model").add_argument
    add("--model", default="mlx_model", help="folder made by convert.py")
    add("--adapter-file", default="adapters.npz", help="adapters to write, or to use")
    add("--no-adapter", action="store_true", help="test or generate with the base model")
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="type to compute in; auto is float32 on a CPU and bfloat16 on a GPU, but float16 to "
        "generate on an M1 or M2",
    )
    add("--seed", type=seed, default=0, help="seed of all random numbers")

    add = parser.add_argument_group("training").add_argument
    add("--data", default="data/", help="folder of train.jsonl, valid.jsonl, test.jsonl")
    add("--lora-layers", type=count, default=16, help="layers to adapt, from the top")
    add("--batch-size", type=count, default=4, help="sequences a step, on all ranks")
    add("--iters", type=count, default=1000, help="steps to train in all")
    add("--learning-rate", type=rate, default=1e-5, help="Adam's learning rate")
    add("--grad-checkpoint", action="store_true", help="less memory, a third more time")
    add("--max-seq-length", type=length, default=2048, help="tokens of a text at most")
    add(
        "--resume-adapter-file",
        help="adapters to go on from: where they were saved, or as the start of a new run if no "
        "state lies beside them",
    )
    add("--steps-per-report", type=count, default=10, help="steps between two reports")
    add("--steps-per-eval", type=count, default=200, help="steps between two validations")
    add("--save-every", type=count, default=100, help="steps between two saves")

    add = parser.add_argument_group("evaluation").add_argument
    add("--val-batches", type=batches, default=25, help="batches a validation, -1: all")
    add("--test-batches", type=batches, default=500, help="batches of the test, -1: all")

    add = parser.add_argument_group("generation").add_argument
    add("--num-tokens", "-n", type=count, default=100, help="tokens to generate at most")
    add("--write-every", type=count, default=1, help="tokens between two writes")
    add("--temp", type=temperature, default=0.8, help="sampling temperature, 0: greedy")
    return parser


def check_arguments(args: argparse.Namespace, n_ranks: int = 1, writes: bool = True) -> None:
    """Find what cannot work before anything is loaded, with `n_ranks` processes; `writes` says
    whether this is the one whose files count. A prompt that is to be read, is.

    Raises ValueError or FileNotFoundError.
    """
    if not (args.train or args.test or args.prompt is not None):
        raise ValueError("nothing to do: give --train, --test or --prompt")
    if args.batch_size % n_ranks:
        raise ValueError(
            f"--batch-size {args.batch_size} is the batch of all {n_ranks} ranks: give a multiple"
        )
    if args.prompt == "-" and n_ranks > 1:
        raise ValueError("--prompt - never ends under a launcher: give the text itself")
    if args.prompt == "-":
        if sys.stdin is None:
            raise ValueError("--prompt - reads standard input, which is closed")
        args.prompt = decode_text(sys.stdin.buffer.read(), "--prompt")
    if args.prompt and any("\ud800" <= character <= "\udfff" for character in args.prompt):
        raise ValueError("--prompt is not valid UTF-8")
    if args.train and args.no_adapter:
        raise ValueError("--no-adapter is for --test and --prompt: training makes an adapter")
    if args.resume_adapter_file is not None and not args.train:
        raise ValueError("--resume-adapter-file goes with --train; to use adapters, --adapter-file")
    if not writes:
        return
    if args.train:
        check_replaceable(Path(args.adapter_file))
    adapter = adapter_to_load(args)
    if adapter is not None and not Path(adapter).is_file():
        raise FileNotFoundError(
            f"there is no adapter file {adapter}{did_you_mean(adapter)}: make one with --train, "
            "or give --no-adapter for the base model alone"
        )
    if adapter is not None:
        check_adapter(adapter)


def check_adapter(adapter: str | Path) -> None:
    """Raise ValueError where an adapter file, or its state, is of another kind than lora.py's."""
    for path in (Path(adapter), sibling(adapter, ".state.npz")):
        if path.is_file():
            check_content(path)
    if is_safetensors(adapter):
        raise ValueError(
            f"{adapter} is a safetensors file, as PEFT's and mlx-lm's adapters are, which are not "
            "supported: name the .npz file that lora.py --train wrote"
        )


def check_replaceable(adapter: Path) -> None:
    """Raise what the user can mend, where training cannot write this file or should not."""
    folder = partial_file(adapter).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder of --adapter-file {adapter} does not exist")
    if adapter.is_dir():
        raise IsADirectoryError(f"--adapter-file {adapter} is a folder: name a file")
    if adapter.suffix in FOREIGN_SUFFIXES:
        raise ValueError(
            f"--adapter-file {adapter}: training writes NumPy's format: name {adapter.stem}.npz"
        )
    if not os.access(folder, os.W_OK):
        raise ValueError(f"nothing can be written into the folder of --adapter-file {adapter}")
    if adapter.exists() and not holds_adapters(adapter):
        raise ValueError(f"--adapter-file {adapter} exists and holds no adapters: name another")
    find_siblings(adapter)


def holds_adapters(path: Path) -> bool:
    """Whether this is an adapter file, or an empty one."""
    if not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return all(ADAPTER_KEY.fullmatch(n.removesuffix(".npy")) for n in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return path.stat().st_size == 0


def adapter_to_load(args: argparse.Namespace) -> str | None:
    """The adapter file that this run starts from, if any."""
    if args.train:
        return args.resume_adapter_file
    return None if args.no_adapter else args.adapter_file


# -------------------------------------------------------------------------------------------------
# Ranks. MLX joins their numbers, but when one ends it tells its neighbours alone, and nobody when a
# cable is pulled. So rank 0 keeps a connection to each of the others, on which nothing is said: the
# system closes it when a process ends, and probes it when it is silent.


def launched_rank() -> int | None:
    """This process's place among those that a launcher has started, or None without a launcher."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), None)


def meeting_point() -> tuple[str, str, int, int] | None:
    """MLX's backend, the host and port where rank 0 meets the others, one above the ports that MLX
    uses, and how many ranks there are, as `mlx.launch` says; None where it has not launched us.
    """
    env = os.environ
    if "NCCL_HOST_IP" in env and "MLX_WORLD_SIZE" in env:
        return "nccl", env["NCCL_HOST_IP"], int(env["NCCL_PORT"]) + 1, int(env["MLX_WORLD_SIZE"])
    if "MLX_JACCL_COORDINATOR" in env:
        host, _, port = env["MLX_JACCL_COORDINATOR"].rpartition(":")
        devices = json.loads(Path(env["MLX_IBV_DEVICES"]).read_text())
        return "jaccl", host, int(port) + 1, len(devices)
    if "MLX_HOSTFILE" in env:
        nodes = json.loads(Path(env["MLX_HOSTFILE"]).read_text().strip() or '[["alone:0"]]')
        addresses = [address.rpartition(":") for node in nodes for address in node]
        return "ring", addresses[0][0], max(int(port) for *_, port in addresses) + 1, len(nodes)
    return None


class Ranks:
    """The processes that compute one run together, of which this is `rank` of `size`; as it is made
    one alone, whose calls cost nothing. `n_sharing` of them, with this one, have its cores.

    A with statement around a run tells the others, at its end, that it ended as theirs do.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.n_sharing = 0, 1, 1
        self.sum_on_gpu = False  # by NCCL
        self.saving = threading.Lock()  # held while files are written: a process does not end then
        self._group: mx.distributed.Group | None = None
        self._peers: dict[int, socket.socket] = {}
        self._left = threading.Event()  # rank 0 has, with a goodbye

    @classmethod
    def join(cls) -> "Ranks":
        """Meet the others that the launcher has started. Raises RuntimeError where that fails; the
        process ends when one of them does not come.
        """
        ranks, rank, point = cls(), launched_rank(), meeting_point()
        if rank is None or (point and point[-1] == 1):
            return ranks
        backend, *place = point or ("mpi",)  # which ends all ranks itself when one ends
        if place:
            ranks._meet(rank, *place)
        set_portions(training=True)
        signal.alarm(JOINING)  # ends this process; MLX waits for ever, and lets no thread run
        try:
            ranks._group = mx.distributed.init(strict=True, backend=backend)
        except RuntimeError as error:
            sys.stderr = sys.__stderr__
            raise RuntimeError(f"rank {rank} does not reach the others: {error}") from error
        signal.alarm(0)
        ranks.rank, ranks.size = ranks._group.rank(), ranks._group.size()
        ranks.sum_on_gpu = backend == "nccl"
        boot = Path("/proc/sys/kernel/random/boot_id")  # of this machine, whatever its names
        machine = boot.read_text() if boot.exists() else platform.node()
        machines = ranks.gather(machine + digest(repr(available_cores()).encode()))
        ranks.n_sharing = machines.count(machines[ranks.rank])
        return ranks

    def _meet(self, rank: int, host: str, port: int, size: int) -> None:
        """Connect rank 0 with all others, and watch the connections."""
        deadline = time.monotonic() + MEETING
        if rank == 0:
            try:
                server = socket.create_server((host, port), backlog=size)
            except OSError as error:
                raise OSError(
                    f"rank 0 cannot wait at {host}:{port} ({error}): is another run "
                    "there? mlx.launch takes another port with -p"
                ) from error
            while len(self._peers) < size - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    peer, _ = server.accept()
                    peer.settimeout(1)
                    self._peers[int(peer.recv(8))] = peer
                except TimeoutError:
                    if time.monotonic() > deadline:
                        self._end(min(set(range(1, size)) - self._peers.keys()))
                except (OSError, ValueError):  # it has left again, or is none of ours
                    continue
            server.close()
        while rank > 0 and not self._peers:
            try:
                peer = socket.create_connection((host, port), timeout=5)
                peer.sendall(b"%d" % rank)
                self._peers[0] = peer
            except OSError:
                if time.monotonic() > deadline:
                    self._end(0)
                time.sleep(0.1)
        idle = getattr(socket, "TCP_KEEPIDLE", None) or socket.TCP_KEEPALIVE  # Linux, macOS
        for other, peer in self._peers.items():
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for setting, value in (idle, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3):
                peer.setsockopt(socket.IPPROTO_TCP, setting, value)
            if rank == 0:
                with suppress(OSError):
                    peer.sendall(WELCOME)
            else:
                self._expect(WELCOME, other)
            threading.Thread(target=self._expect, args=(GOODBYE, other), daemon=True).start()

    def _expect(self, word: bytes, other: int) -> None:
        """Wait for the other's `word`, and end this process when anything else comes."""
        message = b""
        with suppress(OSError):
            message = self._peers[other].recv(len(word))
        if message != word:
            self._end(int(message or other), told=bool(message))
        if word == GOODBYE:
            self._left.set()

    def _end(self, lost: int, told: bool = False) -> NoReturn:
        """End this process, and the others with it, since the rank `lost` is."""
        with self.saving:
            if not told:
                print(
                    f"lora.py: error: rank {lost} has ended or cannot be reached, so the others "
                    "end; training goes on from its last save with --resume-adapter-file",
                    file=sys.__stderr__,
                    flush=True,
                )
            for peer in self._peers.values():
                with suppress(OSError):
                    peer.sendall(b"%d" % lost)
            os._exit(1)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if self.size == 1:
            return
        if error is None or self._ends_alike(error):
            for peer in self._peers.values():
                with suppress(OSError):
                    peer.sendall(GOODBYE)
        else:
            time.sleep(1)  # where another's end is the cause, `_expect` says so and ends this one
            sys.stderr = sys.__stderr__

    def _ends_alike(self, error: BaseException) -> bool:
        """Whether the others end for the same reason; if so, rank 0 alone speaks of it."""
        return isinstance(error, COMMON_ENDS) if self.rank == 0 else self._left.wait(2)

    def sum(self, x: mx.array) -> mx.array:
        """The sum of all ranks' `x`, in one message."""
        return x if self._group is None else mx.distributed.all_sum(x, group=self._group)

    def add(self, *values: float) -> list[float]:
        """Each value's sum over all ranks, in float32 where there are several."""
        if self.size == 1:
            return list(values)
        return self.sum(mx.array([float(value) for value in values])).tolist()

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks, each of at most 8 KiB in UTF-8."""
        rows = np.zeros((self.size, 8192), np.uint8)
        content = np.frombuffer(text.encode(), np.uint8)
        rows[self.rank, : len(content)] = content
        return [bytes(row).rstrip(b"\0").decode() for row in np.array(self.sum(mx.array(rows)))]

    def read(self, path: str | Path) -> bytes | None:
        """The content of rank 0's file, or None where there is none; no other needs to have it."""
        content = None
        if self.rank == 0 and Path(path).is_file():
            content = Path(path).read_bytes()
        if self.size == 1:
            return content
        size = -1 if content is None else len(content)
        size = self.sum(mx.array(size if self.rank == 0 else 0)).item()
        if size < 0:
            return None
        return bytes(self.sum(mx.array(bytearray(content or size))))


ALONE = Ranks()


# -------------------------------------------------------------------------------------------------
# Tokenizer


class Tokenizer:
    """A SentencePiece model (Kudo and Richardson, 2018) from a `tokenizer.model` file.

    Raises FileNotFoundError or ValueError when the file is missing, is no SentencePiece model, or
    lacks the tokens that begin and end a text.
    """

    def __init__(self, model_path: str | Path):
        if not Path(model_path).is_file():
            raise FileNotFoundError(f"{model_path} is missing: convert the model with convert.py")
        check_content(model_path)
        try:
            self._model = SentencePieceProcessor(model_proto=Path(model_path).read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{model_path} is not a SentencePiece model: {error}") from error
        if min(self._model.bos_id(), self.eos_id) < 0:
            raise ValueError(f"{model_path} has no token for the beginning or the end of a text")

    @property
    def eos_id(self) -> int:
        return self._model.eos_id()

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size()

    def encode(self, s: str, eos: bool = False) -> list[int]:
        """Token ids of `s` after the beginning-of-sequence token, with the end token if asked."""
        ids = [self._model.bos_id(), *self._model.encode(s)]
        return [*ids, self.eos_id] if eos else ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


def decode_stream(
    ids: Iterator[int], tokenizer: Tokenizer, prompt_ids: list[int], every: int = 1
) -> Iterator[str]:
    """Decode ids as they come; the pieces, joined, are what all of them add to the prompt.

    A piece comes every `every` ids. A character whose bytes are spread over ids is held back until
    it is whole.
    """
    # Ids are decoded after some that are already shown: the first of a text loses its space.
    context, fresh = list(prompt_ids), []
    shown = tokenizer.decode(context)
    for count in itertools.count(1):
        token = next(ids, None)
        if token is not None:
            fresh.append(token)
            if count % every:
                continue
        text = tokenizer.decode(context + fresh)
        if token is None or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            alone = tokenizer.decode(fresh)
            if alone.strip():
                context, fresh, shown = fresh, [], alone
            else:
                context, fresh, shown = context + fresh, [], text
        if token is None:
            return


# -------------------------------------------------------------------------------------------------
# Data


class Dataset:
    """The texts of a JSONL file: of each line's object, the string under `key`.

    Raises FileNotFoundError, or ValueError with the file and the line that is wrong.
    """

    def __init__(self, path: str | Path, key: str = "text"):
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"{path} is missing{did_you_mean(path)}: --data takes a folder with train.jsonl, "
                "valid.jsonl and test.jsonl, such as cwk_create_dataset.py makes"
            )
        check_content(path)
        with open(path, "rb") as lines:
            self._texts = [
                parse_record(line, key, f"{path}, line {i}")
                for i, line in enumerate(lines, start=1)
                if line.strip()
            ]
        if not self._texts:
            raise ValueError(f'{path} is empty: each line holds one {{"{key}": "..."}}')
        self._encoded: tuple[Tokenizer, list[np.ndarray]] | None = None

    def __getitem__(self, index: int) -> str:
        return self._texts[index]

    def __len__(self) -> int:
        return len(self._texts)

    def encode(self, tokenizer: Tokenizer) -> list[np.ndarray]:
        """The token ids (int32) of each text, from BOS to EOS. Computed once."""
        if self._encoded is None or self._encoded[0] is not tokenizer:
            rows = [np.array(tokenizer.encode(text, eos=True), np.int32) for text in self._texts]
            self._encoded = tokenizer, rows
        return self._encoded[1]

    def cut(self, tokenizer: Tokenizer, max_length: int) -> int:
        """Shorten what is longer than `max_length` tokens; gives the number of such texts."""
        rows = self.encode(tokenizer)
        self._encoded = tokenizer, [row[:max_length] for row in rows]
        return sum(len(row) > max_length for row in rows)


def load(
    args: argparse.Namespace,
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """The training, validation and test set of `args.data`; None for one that is not needed.

    Raises FileNotFoundError or ValueError when a set that is needed is missing or malformed.
    """
    folder = Path(args.data)
    train_set = Dataset(folder / "train.jsonl") if args.train else None
    val_set = Dataset(folder / "valid.jsonl") if args.train else None
    test_set = Dataset(folder / "test.jsonl") if args.test else None
    return train_set, val_set, test_set


def iterate_batches(
    dset: Dataset,
    tokenizer: Tokenizer,
    batch_size: int,
    train: bool = False,
    seed: int = 0,
    skip: int = 0,
) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
    """Batches of sequences of similar length, in a random order that `seed` decides.

    Yields inputs (B, L), targets (B, L), which are the inputs one position on, and lengths (B,),
    how many of a row's targets count; all int32, L one of few lengths. Evaluation is one pass over
    all records. Training goes on for ever; an epoch's order depends on `seed` and the epoch
    alone, and what does not fill a batch is left out, other records in each epoch. `skip` batches
    are passed over.
    """
    rows = dset.encode(tokenizer)
    padded = padded_lengths(rows)
    batch_size = min(batch_size, len(rows))
    epochs_done, skip = divmod(skip, len(rows) // batch_size) if train else (0, skip)
    for epoch in itertools.count(epochs_done):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(rows))
        if train:
            order = order[: len(rows) - len(rows) % batch_size]
        order = sorted(order, key=lambda i: padded[i])
        starts = rng.permutation(np.arange(0, len(order), batch_size))
        for start in starts[skip if epoch == epochs_done else 0 :]:
            chosen = order[start : start + batch_size]
            yield pad_batch([rows[i] for i in chosen], padded[chosen[-1]])
        if not train:
            return


def padded_lengths(rows: list[np.ndarray]) -> list[int]:
    """Positions that each row's inputs take in a batch: one of few lengths, since a GPU prepares
    itself for each anew, and yet with little padding.
    """
    lengths = [len(row) - 1 for row in rows]
    padded, current = {}, None
    for length in sorted(set(lengths), reverse=True):
        multiple = -(-length // 8) * 8
        if current is None or multiple <= (1 - PADDING) * current:
            current = multiple
        padded[length] = current
    return [padded[length] for length in lengths]


def pad_batch(rows: list[np.ndarray], length: int) -> tuple[mx.array, mx.array, mx.array]:
    """Inputs and targets of `length` positions, and lengths, of rows; see `iterate_batches`."""
    padded = np.zeros((len(rows), length + 1), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    lengths = np.array([len(row) - 1 for row in rows], np.int32)
    return mx.array(padded[:, :-1]), mx.array(padded[:, 1:]), mx.array(lengths)


# -------------------------------------------------------------------------------------------------
# Loss and evaluation


def loss(
    model: Model, inputs: mx.array, targets: mx.array, lengths: mx.array
) -> tuple[mx.array, mx.array]:
    """Mean cross-entropy in nats over the targets that count, and how many they are.

    inputs, targets: (B, L); lengths: (B,), the first so many targets of a row count.
    """
    logits, _ = model(inputs)
    losses = cross_entropy(logits, targets)  # (B, L)
    mask = mx.arange(targets.shape[1]) < lengths[:, None]
    n_tokens = mask.sum()
    return mx.where(mask, losses, 0).sum() / n_tokens, n_tokens


def on_each(
    streams: list[mx.Stream], function: Callable, *batch: mx.array, ranks: Ranks = ALONE
) -> list:
    """Call `function` with a share of this rank's share of the batch's rows on each of the
    streams; where there are fewer rows than shares, some get none.
    """
    results = []
    n_shares = len(streams) * ranks.size
    for first, stream in zip(range(ranks.rank, len(batch[0]), ranks.size), streams, strict=False):
        with mx.stream(stream):
            results.append(function(*(array[first::n_shares] for array in batch)))
    return results


def evaluate(
    model: Model,
    dataset: Dataset,
    loss: Callable,
    tokenizer: Tokenizer,
    batch_size: int,
    num_batches: int,
    streams: list[mx.Stream] | None = None,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> float | None:
    """Mean loss a token over `num_batches` batches of `dataset`; -1 takes every record, once.

    The rows of a batch are shared out to the ranks, and to `streams`, by default new ones. When
    `stop` gives true on any rank, it ends with the batch in hand, and gives None.
    """
    total_loss, total_tokens = 0.0, 0
    n_all = math.ceil(len(dataset) / batch_size)
    n_batches = n_all if num_batches == -1 else min(num_batches, n_all)
    batches = itertools.islice(iterate_batches(dataset, tokenizer, batch_size), n_batches)
    streams = streams or open_streams(batch_size // ranks.size, ranks.n_sharing)
    compute = partial(on_each, streams, partial(loss, model), ranks=ranks)
    compute = device.bounded(compute, [], queues=False)
    with device.limits_restored():
        for batch in tqdm(batches, "Evaluating", n_batches, leave=False, disable=None):
            parts = compute(*batch)
            mx.eval(parts)
            batch_loss = sum(mean.item() * n_tokens.item() for mean, n_tokens in parts)
            batch_tokens = sum(n_tokens.item() for _, n_tokens in parts)
            batch_loss, batch_tokens, stopping = ranks.add(batch_loss, batch_tokens, stop())
            total_loss += batch_loss
            total_tokens += batch_tokens
            if stopping:
                return None
    return total_loss / total_tokens


# -------------------------------------------------------------------------------------------------
# Training


def add_lora(model: Model, layers: list[int], rank: int = LORA_RANK) -> None:
    """Freeze the model and wrap wq and wv of the given layers with LoRA matrices."""
    model.freeze()
    for i in layers:
        attention = model.layers[i].attention
        for name in LORA_PROJECTIONS:
            attention[name] = LoRALinear.from_linear(attention[name], rank)


def top_layers(model: Model, n: int) -> list[int]:
    """Indices of the last `n` layers, or of all when there are fewer."""
    n_layers = len(model.layers)
    return list(range(max(0, n_layers - n), n_layers))


def train(
    model: Model,
    train_set: Dataset,
    val_set: Dataset,
    optimizer: optim.Optimizer,
    loss: Callable,
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    ranks: Ranks = ALONE,
) -> None:
    """Train what is not frozen up to step `args.iters`, reporting and saving on the way.

    The LoRA matrices go to `args.adapter_file` and what a resumed run needs to a file beside it,
    every `args.save_every` steps and at the end. Validation is at the first step, before the
    update, at every `args.steps_per_eval`, and at the last. Each of the ranks takes its rows of
    each batch, and all make the same update; rank 0 alone reports and saves.
    Raises NotSaved when the last save failed; else, after saving, Stopped at SIGINT, SIGTERM or
    SIGHUP, and FloatingPointError when the training has broken down. When the device fails, raises
    RuntimeError, after saving what was computed up to the last report or save.
    """
    streams = open_streams(args.batch_size // ranks.size, ranks.n_sharing)
    identity = describe_run(model.args, train_set, tokenizer, args)
    resuming = args.resume_adapter_file is not None
    done_before, done, seconds = 0, [], 0.0  # of which the last two are since the last report
    if resuming:
        done_before, done, seconds = restore(model, optimizer, identity, args, ranks)
    save_step = partial(try_save, model, optimizer, identity, args.adapter_file, ranks)
    step = make_step(model, optimizer, loss, streams, ranks)
    batches = iterate_batches(
        train_set, tokenizer, args.batch_size, train=True, seed=args.seed, skip=done_before
    )
    entries = read_log(args.resume_adapter_file, done_before) if done_before else []
    log = TrainingLog(args.adapter_file, entries, writes=ranks.rank == 0)
    model.train()
    model.grad_checkpoint = args.grad_checkpoint
    mx.reset_peak_memory()
    start = time.perf_counter()
    iteration, n_broken, saved = done_before, 0, True
    if done_before == args.iters:  # nothing is left to do but to write what was asked for
        saved = save_step(done_before, done, seconds)
    stopping = False  # for a signal; becomes true on all ranks at the same step

    def check(iteration: int) -> bool:
        """Report the validation loss; false where a rank caught a signal meanwhile."""
        start = time.perf_counter()
        value = evaluate(
            model, val_set, loss, tokenizer, args.batch_size, args.val_batches, streams,
            stop=lambda: bool(caught), ranks=ranks,
        )  # fmt: skip
        if value is None:
            return False
        took = time.perf_counter() - start
        say(f"Iter {iteration}: Val loss {value:.3f}, Val took {took:.3f}s")
        if math.isfinite(value):
            log.add(iteration, val_loss=value)
        ranks.add(0)  # the others wait here, and not in a step, for rank 0, which draws
        return True

    def evaluates(iteration: int) -> bool:
        return iteration % args.steps_per_eval == 0 or iteration == args.iters > 1

    def rescue() -> None:
        if iteration > done_before and ranks.size == 1:
            save_step(iteration, done, seconds)

    computed = Computed(model, optimizer, done_before)

    left = range(done_before + 1, args.iters + 1)
    bar = tqdm(left, "Training", total=args.iters, initial=done_before, disable=None)
    with (
        catch_signals() as caught,
        device.limits_restored(),
        at_failing_output(rescue),
        at_failing_device(computed, identity, args.adapter_file, ranks),
    ):
        result = None
        # At the start, or what a signal broke off, which the log does not have.
        validated = {entry["iteration"] for entry in entries if entry["val_loss"] is not None}
        owed = not done_before or evaluates(done_before) and done_before not in validated
        if any(ranks.add(owed and ranks.rank == 0)):
            stopping = not check(max(done_before, 1))
            start = time.perf_counter()
        for iteration, batch in zip(bar, batches, strict=False):
            previous = result
            result = step(*batch, stopping=bool(caught))
            done.append(result)

            if ranks.size == 1:
                stopping = stopping or bool(caught)
            elif previous:  # not `result`, which would have to be waited for
                stopping = stopping or previous[-1].item() > 0
            last = iteration == args.iters or stopping
            report = iteration % args.steps_per_report == 0 or last
            evaluation = evaluates(iteration)
            save = iteration % args.save_every == 0 or last
            if report or evaluation or save:
                mx.eval(done, model.trainable_parameters(), optimizer.state)
                seconds += time.perf_counter() - start
            if report:
                n_broken, mean, n_tokens = report_steps(done, seconds, iteration, n_broken)
                speed = n_tokens / seconds
                log.add(
                    iteration, n_tokens, loss=mean, learning_rate=args.learning_rate,
                    tokens_per_second=speed,
                )  # fmt: skip
                bar.set_postfix_str(f"loss {mean:.3f}, {speed:,.0f} tokens/s")
                done, seconds = [], 0.0
            if report or evaluation or save:
                computed.keep(iteration, done, seconds)
            if evaluation:
                stopping = not check(iteration) or stopping
            if save or stopping or n_broken >= BROKEN_STEPS:
                saved = save_step(iteration, done, seconds)
            if stopping or n_broken >= BROKEN_STEPS:
                break
            if report or evaluation or save:
                start = time.perf_counter()
        stopping = any(ranks.add(stopping or len(caught)))
    if not saved:
        raise NotSaved(args.adapter_file)
    if n_broken >= BROKEN_STEPS:
        raise FloatingPointError(
            f"at iteration {iteration} the last {n_broken} losses or gradients were not finite: "
            "lower --learning-rate, or give --dtype float32 if it is float16"
        )
    if stopping:
        raise Stopped(caught, iteration)
    model.grad_checkpoint = False
    say(f"Peak memory {mx.get_peak_memory() / 1e9:.3f} GB")


@contextmanager
def at_failing_output(save: Callable[[], None]) -> Iterator[None]:
    """Save before an OSError goes on: nobody reads the output any more, or its disk is full."""
    try:
        yield
    except OSError:
        save()
        raise


class Computed:
    """What a run has computed to its end, which outlives an error of the device: that of an
    iteration at which the device was waited for.
    """

    def __init__(self, model: Model, optimizer: optim.Optimizer, iteration: int):
        self.model, self.optimizer = model, optimizer
        self.keep(iteration, [], 0.0)

    def keep(self, iteration: int, done: list, seconds: float) -> None:
        self.iteration, self.done, self.seconds = iteration, list(done), seconds
        self.matrices = self.model.trainable_parameters()
        self.moments = tree_map(lambda value: value, self.optimizer.state)

    def save(self, identity: dict, adapter_file: str) -> None:
        """Save it, after putting it into the place of what came later."""
        self.model.update(self.matrices)
        self.optimizer.state.update(self.moments)
        save(
            self.model, self.optimizer, identity, adapter_file, self.iteration, self.done,
            self.seconds,
        )  # fmt: skip


@contextmanager
def at_failing_device(
    computed: Computed, identity: dict, adapter_file: str, ranks: Ranks
) -> Iterator[None]:
    """Have rank 0 save what was computed before an error of the device, if it can still be read,
    and say so with the error. The others are not waited for: theirs may be the error.
    """
    first = computed.iteration
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if ranks.rank > 0 or computed.iteration == first:
            raise
        try:
            with ranks.saving:
                computed.save(identity, adapter_file)
        except (RuntimeError, MemoryError, OSError) as lost:
            warn(f"iteration {computed.iteration} could not be saved to {adapter_file}: {lost}")
            raise error from lost
        raise RuntimeError(
            f"{error}; iteration {computed.iteration} is saved, go on with "
            f"--resume-adapter-file {adapter_file}"
        ) from error


class Stopped(Exception):
    """A signal, here or on another rank, ended the training, after a step that was saved."""

    def __init__(self, caught: list[int], iteration: int):
        super().__init__(f"stopped at iteration {iteration}")
        self.signum = caught[0] if caught else signal.SIGTERM


class NotSaved(OSError):
    """The last save failed."""

    def __init__(self, adapter_file: str):
        super().__init__(f"the adapters of the last step could not be saved to {adapter_file}")


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Gives a list to which a signal that ends a process is appended. A second one acts at once."""
    caught = []
    before = {}

    def catch(signum: int, _: object) -> None:
        caught.append(signum)
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup has it
                before[signum] = signal.signal(signum, catch)
    except ValueError:  # not the main thread, which alone gets signals
        before.clear()
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def report_steps(
    done: list, seconds: float, iteration: int, n_broken: int
) -> tuple[int, float, int]:
    """Report the steps up to `iteration`, and warn of each whose update was left out.

    done: what each step gave; n_broken: how many steps right before them were not finite. Gives how
    many at their end are not, the mean loss and the tokens.
    """
    losses, n_tokens, finite, _ = np.array(done, float).T
    for i in np.flatnonzero(finite == 0):
        at = iteration - len(done) + 1 + i
        warn(f"iteration {at}: the loss or a gradient is not finite; this update is left out")
    mean = losses[finite == 1].mean() if finite.any() else math.nan
    say(
        f"Iter {iteration}: Train loss {mean:.3f}, "
        f"It/sec {len(done) / seconds:.3f}, Tokens/sec {n_tokens.sum() / seconds:.3f}"
    )
    tail = len(list(itertools.takewhile(lambda is_finite: not is_finite, finite[::-1])))
    return tail + n_broken if tail == len(done) else tail, mean, int(n_tokens.sum())


def make_step(
    model: Model,
    optimizer: optim.Optimizer,
    loss: Callable,
    streams: list[mx.Stream],
    ranks: Ranks = ALONE,
) -> Callable:
    """A function that trains on a batch, and gives its mean loss, its number of tokens, whether
    loss and gradients were finite, and whether any rank was `stopping` when it called it. If they
    were not finite, it changes nothing. It goes on from the matrices and moments of this moment.

    The rows of a batch are shared out to the ranks and `streams`, and gradients joined by tokens:
    one vector of float32 travels, of the gradients and three numbers more. What the function
    gives is still being computed when it returns, so that the next batch is made meanwhile. On a
    GPU the step is compiled, which joins its small kernels; on a CPU that gains nothing.

    NCCL's sum is the GPU's own work, and part of the step. Any other is waited for by the processor
    between two halves: macOS ends a GPU's work that waits for some seconds, as for a slower rank.
    """
    loss_and_grad = nn.value_and_grad(model, loss)
    vector = {"lora": to_vector(model.trainable_parameters())}
    optimizer.init(vector)
    state = [model.state, optimizer.state, vector]
    n_values = vector["lora"].size

    def share(*rows: mx.array) -> mx.array:
        (value, n_tokens), gradients = loss_and_grad(model, *rows)
        return mx.concatenate([to_vector(gradients), mx.stack([value, mx.array(1.0)])]) * n_tokens

    def add_up(stopping: mx.array, *batch: mx.array) -> mx.array:
        matrices = model.trainable_parameters()
        shares = on_each(streams, share, *batch, ranks=ranks)
        model.update(matrices)  # for which `loss_and_grad` leaves what it traced
        total = sum(shares) if shares else mx.zeros(n_values + 2)
        return mx.concatenate([total, stopping[None]])

    def update(total: mx.array) -> tuple[mx.array, ...]:
        n_tokens, stopping = total[-2], total[-1]
        gradient, value = total[:-3] / n_tokens, total[-3] / n_tokens
        # Anything that is not finite makes the sum so, and then all stays as it was.
        finite = mx.isfinite(total.sum())
        moments = tree_map(lambda value: value, optimizer.state)
        after = optimizer.apply_gradients({"lora": gradient}, vector)
        keep = partial(mx.where, finite)
        vector.update(tree_map(keep, after, vector))
        model.update(from_vector(vector["lora"], model.trainable_parameters()))
        optimizer.state.update(tree_map(keep, optimizer.state, moments))
        return value, n_tokens, finite, stopping

    def step_at_once(*batch: mx.array) -> tuple[mx.array, ...]:
        return update(ranks.sum(add_up(*batch)))

    def step_in_halves(*batch: mx.array) -> tuple[mx.array, ...]:
        total = add_up(*batch)
        mx.eval(total)
        total = ranks.sum(total)
        mx.eval(total)
        return update(total)

    if ranks.size == 1 or ranks.sum_on_gpu:
        step = device.compiled(step_at_once, inputs=state, outputs=state)
    else:
        add_up = device.compiled(add_up, inputs=state)
        update = device.compiled(update, inputs=state, outputs=state)
        step = step_in_halves

    def start_step(*batch: mx.array, stopping: bool = False) -> tuple[mx.array, ...]:
        result = step(mx.array(float(stopping)), *batch)
        mx.async_eval(result, state)
        return result

    return device.bounded(start_step, state)


def to_vector(tree: dict) -> mx.array:
    """All values of a tree as one vector: an update of many small matrices costs as much as one."""
    return mx.concatenate([value.flatten() for _, value in tree_flatten(tree)])


def from_vector(vector: mx.array, tree: dict) -> dict:
    """A tree of the shapes of `tree`, with the values of a vector that `to_vector` made."""
    leaves = tree_flatten(tree)
    ends = np.cumsum([value.size for _, value in leaves]).tolist()
    parts = zip(leaves, mx.split(vector, ends[:-1]), strict=True)
    return tree_unflatten([(name, part.reshape(value.shape)) for (name, value), part in parts])


def say(line: str) -> None:
    """Print a line to standard output, past any progress bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def partial_file(path: str | Path) -> Path:
    """Where a file is first written: beside it, or beside what a link leads to."""
    return Path(f"{Path(path).resolve()}.partial")


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when it is whole, and not before. One that is
    whole and cannot take it stays for `finish_save`.
    """
    beside = partial_file(path)
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except Exception:
        beside.unlink(missing_ok=True)
        raise
    os.replace(beside, beside.with_suffix(""))


class TrainingLog:
    """The figures of a run, beside its adapters: `adapters.log.jsonl`, one object a report or
    validation, and `adapters.png`, the curves of the losses, drawn at each validation.

    It begins with the `entries` of the run that this one goes on with. What cannot be written is a
    warning: the training is worth more. Only the one that `writes` touches files.
    """

    def __init__(self, adapter_file: str | Path, entries: list[dict], writes: bool = True):
        self.writes = writes
        self.file = sibling(adapter_file, ".log.jsonl")
        self.picture = sibling(adapter_file, ".png")
        self.entries = entries
        self._write(replacing, self.entries)

    def add(self, iteration: int, n_tokens: int = 0, **figures: float) -> None:
        """Add a report or a validation, which draws the picture anew; `n_tokens` are those since
        the last entry. What is not finite is left out, since JSON has no NaN.
        """
        names = ("loss", "val_loss", "learning_rate", "tokens_per_second")
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        entry = {
            "iteration": iteration,
            **{name: finite.get(name) for name in names},
            "tokens": n_tokens + (self.entries[-1]["tokens"] if self.entries else 0),
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self.entries.append(entry)
        self._write(partial(open, mode="ab"), [entry])
        if "val_loss" in finite and self.writes:
            try:
                self._draw()
            except Exception as error:  # whatever the library raises
                warn(f"{self.picture} could not be written: {error}")

    def _write(self, opened: Callable, entries: list[dict]) -> None:
        if not self.writes:
            return
        try:
            with opened(self.file) as file:
                file.writelines(json.dumps(entry).encode() + b"\n" for entry in entries)
        except OSError as error:
            warn(f"{self.file} could not be written: {error}")

    def _draw(self) -> None:
        os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be there
        from matplotlib.figure import Figure  # here: nothing else needs its second of loading

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot(xlabel="iteration", ylabel="loss, nats a token")
        for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
            points = [(e["iteration"], e[key]) for e in self.entries if e[key] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label)
        best, at = min(
            (e["val_loss"], e["iteration"]) for e in self.entries if e["val_loss"] is not None
        )
        axes.plot(at, best, "*", markersize=16, label=f"best validation: {best:.3f} at {at}")
        n_tokens = max(self.entries[-1]["tokens"] / self.entries[-1]["iteration"], 1)
        upper = axes.secondary_xaxis("top", (lambda i: i * n_tokens, lambda t: t / n_tokens))
        upper.set_xlabel("tokens seen")
        axes.grid(alpha=0.3)
        axes.legend()
        with replacing(self.picture) as file:
            figure.savefig(file, format="png", dpi=120, metadata={"Title": PLOT_TITLE})


def read_log(adapter_file: str | Path, last: int) -> list[dict]:
    """The entries beside an adapter file up to iteration `last`; none where there is no log."""
    file = sibling(adapter_file, ".log.jsonl")
    lines = file.read_bytes().splitlines() if file.is_file() else []
    return [entry for entry in map(parse_entry, lines) if entry and entry["iteration"] <= last]


# -------------------------------------------------------------------------------------------------
# State: all that a run needs to go on as if it had never been interrupted, in one file. Training
# draws no random numbers but those of the data's order, which is a function of seed and epoch.


def describe_run(
    shape: ModelArgs, train_set: Dataset, tokenizer: Tokenizer, args: argparse.Namespace
) -> dict:
    """What decides a run's result, so that a state is not used in another run."""
    rows = train_set.encode(tokenizer)
    return {
        "the training data": digest(
            np.concatenate([np.append(len(row), row) for row in rows]).tobytes()
        ),
        "the model": digest(checksums(Path(args.model) / "weights.npz")),
        "params.json": vars(shape),
        "--batch-size": args.batch_size,
        "--dtype": args.dtype,
        "--learning-rate": args.learning_rate,
        "--lora-layers": args.lora_layers,
        "--seed": args.seed,
    }


def checksums(weights: Path) -> bytes:
    """The names and checksums of the arrays in a `weights.npz`, or nothing where there is none."""
    if not weights.is_file():
        return b""
    with zipfile.ZipFile(weights) as archive:
        return repr([(m.filename, m.CRC) for m in archive.infolist()]).encode()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def try_save(
    model: Model,
    optimizer: optim.Optimizer,
    identity: dict,
    adapter_file: str,
    ranks: Ranks,
    iteration: int,
    done: list,
    seconds: float,
) -> bool:
    """Have rank 0 save adapters and state, and wait for it. Where that fails, warn, and give False:
    a later save may succeed.
    """
    failed = False
    if ranks.rank == 0:
        try:
            with ranks.saving:
                save(model, optimizer, identity, adapter_file, iteration, done, seconds)
        except OSError as error:
            warn(f"iteration {iteration} could not be saved to {adapter_file}: {error}")
            failed = True
    return not any(ranks.add(failed))


def save(
    model: Model,
    optimizer: optim.Optimizer,
    identity: dict,
    adapter_file: str,
    iteration: int,
    done: list,
    seconds: float,
) -> None:
    """Write the LoRA matrices, float32 under their parameter paths, and beside them the state, with
    what the steps since the last report gave, and the seconds that they took.

    The state names the digests of the adapters that it belongs to and of those that they replace,
    since a kill can come when the state is in its place and the adapters are not yet.
    """
    matrices = {
        name: np.array(value, np.float32)
        for name, value in tree_flatten(model.trainable_parameters())
    }
    state = {f"adapter.{name}": value for name, value in matrices.items()}
    state |= {f"optimizer.{n}": np.array(v) for n, v in tree_flatten(optimizer.state)}
    state |= {"iteration": np.array(iteration), "run": np.array(json.dumps(identity))}
    state |= {"done": np.array(done, float).reshape(-1, 4), "seconds": np.array(seconds)}
    old = Path(adapter_file)
    with replacing(adapter_file) as file:
        np.savez(file, **matrices)
        file.flush()
        os.fsync(file.fileno())  # for `finish_save`
        files = [Path(file.name), *([old] if old.is_file() else [])]
        state["files"] = np.array([digest(path.read_bytes()) for path in files])
        with replacing(sibling(adapter_file, ".state.npz")) as beside:
            np.savez(beside, **state)


def finish_save(adapter_file: str | Path) -> None:
    """Put adapters into the place that a kill has left to those before them, when their state was
    in its own.
    """
    adapter, beside = Path(adapter_file), partial_file(adapter_file)
    if not beside.is_file():
        return
    try:
        with np.load(sibling(adapter_file, ".state.npz")) as archive:
            new, *old = archive["files"].tolist()
    except Exception:  # there is none, or it is damaged, which `restore` says
        return
    untouched = not adapter.is_file() or digest(adapter.read_bytes()) in old
    if untouched and digest(beside.read_bytes()) == new:
        os.replace(beside, beside.with_suffix(""))


def restore(
    model: Model,
    optimizer: optim.Optimizer,
    identity: dict,
    args: argparse.Namespace,
    ranks: Ranks,
) -> tuple[int, list, float]:
    """Put the state beside rank 0's `args.resume_adapter_file` into place; gives the iteration it
    is of, or 0 where there is none, and the steps and seconds that were not reported yet.

    Raises ValueError when the state is damaged, or of a run that differs.
    """
    adapter, path = Path(args.resume_adapter_file), sibling(args.resume_adapter_file, ".state.npz")
    instead = f"to begin a new run from the weights alone, move {path} away"
    content = ranks.read(path)
    if content is None:
        say(f"A new run begins from the weights in {adapter}: there is no {path}")
        return 0, [], 0.0

    def saved(prefix: str, tree: dict) -> dict:
        return tree_map_with_path(lambda name, _: mx.array(state[f"{prefix}.{name}"]), tree)

    try:
        with np.load(io.BytesIO(content)) as archive:
            state = dict(archive)
        saved_identity = json.loads(str(state["run"]))
        iteration, adapters = int(state["iteration"]), state["files"][0]
        matrices = saved("adapter", model.trainable_parameters())
        optimizer.init({"lora": to_vector(model.trainable_parameters())})
        moments = saved("optimizer", optimizer.state)
        done, seconds = list(state.get("done", [])), float(state.get("seconds", 0))
    except Exception as error:  # a damaged archive raises almost anything
        raise ValueError(f"{path} is damaged ({error}); {instead}") from error
    if digest(ranks.read(adapter) or b"") != adapters:
        say(f"A new run begins from the weights in {adapter}: {path} is of other adapters")
        return 0, [], 0.0
    for name, value in identity.items():
        if saved_identity.get(name, value) != value:  # an older state does not tell all
            was = f" ({saved_identity.get(name)} then)" if name.startswith("--") else ""
            raise ValueError(f"{name} is not that of the run in {path}{was}; {instead}")
    if iteration > args.iters:
        raise ValueError(
            f"{path} is of iteration {iteration}, and --iters {args.iters} counts from the start"
        )
    model.update(matrices)
    optimizer.state.update(moments)
    say(f"The run goes on after iteration {iteration}")
    return iteration, done, seconds


def load_adapter(model: Model, path: str | Path, ranks: Ranks = ALONE) -> None:
    """Put the LoRA matrices of rank 0's .npz file into the model; layers and rank are the file's.

    Raises ValueError, which names the file and the key, when the file does not fit the model.
    """
    matrices = read_adapter(path, ranks)
    layers = {int(ADAPTER_KEY.fullmatch(name)[1]) for name in matrices}
    if max(layers) >= len(model.layers):
        raise ValueError(
            f"{path} adapts layer {max(layers)} of a model that has {len(model.layers)} layers: "
            "use the model that it was trained on"
        )
    lora_ranks = {matrix.shape[name.endswith("lora_a")] for name, matrix in matrices.items()}
    add_lora(model, sorted(layers), max(lora_ranks))
    expected = dict(tree_flatten(model.trainable_parameters()))
    for name in expected:
        if name not in matrices:
            raise ValueError(f"{path} lacks {name}: the file is not whole, train again")
        if matrices[name].shape != expected[name].shape:
            raise ValueError(
                f"{name} in {path} has the shape {matrices[name].shape}, the model needs "
                f"{expected[name].shape}: use the model that it was trained on"
            )
    model.update(tree_unflatten([(name, mx.array(value)) for name, value in matrices.items()]))


# -------------------------------------------------------------------------------------------------
# Generation


def generate(model: Model, prompt: str, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Write the prompt and up to `args.num_tokens` tokens that follow it to standard output, and
    how fast that was to standard error.
    """
    open_streams(1)  # after training, all cores for one product again
    mx.reset_peak_memory()
    prompt_ids = tokenizer.encode(prompt)
    times = [time.perf_counter()]  # of the start, and of each token
    print(prompt, end="", flush=True)
    ids = generate_step(model, prompt_ids, args.temp, tokenizer.vocab_size)
    ids = timed(ids, times)
    ids = itertools.islice(ids, args.num_tokens)
    ids = itertools.takewhile(lambda token: token != tokenizer.eos_id, ids)
    with device.wired():
        for piece in decode_stream(ids, tokenizer, prompt_ids, args.write_every):
            print(piece, end="", flush=True)
    print(flush=True)
    speed = ""  # one token alone has none
    if len(times) > 2:
        speed = f", {(len(times) - 2) / (times[-1] - times[1]):.3f} tokens/sec"
    print(
        f"Prompt: {len(prompt_ids)} tokens, {len(prompt_ids) / (times[1] - times[0]):.3f} "
        f"tokens/sec; generation: {len(times) - 1} tokens{speed}; "
        f"peak memory {mx.get_peak_memory() / 1e9:.3f} GB",
        file=sys.stderr,
    )


def timed(items: Iterator, times: list[float]) -> Iterator:
    """The items; when each came is appended to `times`."""
    for item in items:
        times.append(time.perf_counter())
        yield item


# -------------------------------------------------------------------------------------------------
# Loading


def load_model(folder: str | Path, dtype: mx.Dtype | None = None) -> tuple[Model, Tokenizer]:
    """The model and the tokenizer that convert.py wrote into `folder`.

    Floating-point weights come in `dtype`, by default the device's.
    Raises FileNotFoundError or ValueError when a file is missing, malformed or does not fit, and
    MemoryError when the memory does not hold the weights.
    """
    folder = Path(folder)
    for name in ("params.json", "weights.npz", "tokenizer.model"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing{did_you_mean(folder / name)}: --model takes a "
                "folder that convert.py made"
            )
        check_content(folder / name)
    model = read_config(folder / "params.json")
    tokenizer = Tokenizer(folder / "tokenizer.model")
    if tokenizer.vocab_size > model.args.vocab_size:
        raise ValueError(
            f"{folder / 'tokenizer.model'} has {tokenizer.vocab_size} tokens, the model "
            f"{model.args.vocab_size}: convert the model with its own tokenizer"
        )
    load_weights(model, folder / "weights.npz", dtype or device.default_dtype())
    return model, tokenizer


def read_config(path: Path) -> Model:
    """An empty model of the shape that `params.json` gives, with quantized layers if it says so."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        quantization = config.pop("quantization", None)
        args = ModelArgs(**config)
        model = Model(args)
        if quantization is not None:
            nn.quantize(
                model,
                **quantization,
                class_predicate=lambda name, m: isinstance(m, nn.Linear) and name != "output",
            )
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path} does not describe a model ({error}): run convert.py") from error
    return model


def load_weights(model: Model, path: Path, dtype: mx.Dtype) -> None:
    """Fill the model with the arrays of `weights.npz`, one after the other.

    Raises ValueError when the file is damaged, or an array is missing, unknown, or of another shape
    than the model needs.
    """
    # NumPy reads as fast as `mx.load`, whose threads can abort a process that ends soon after.
    try:
        archive = np.load(path)
        names = set(archive.files)
    except Exception as error:  # a damaged archive raises almost anything
        raise ValueError(f"{path} is damaged ({error}): run convert.py") from error
    expected = dict(tree_flatten(model.parameters()))
    sizes = (v.nbytes if v.dtype == mx.uint32 else v.size * dtype.size for v in expected.values())
    check_memory(sum(sizes))
    for name in sorted(expected.keys() | names):
        if name not in expected or name not in names:
            lacks = "lacks" if name in expected else "has an unknown"
            raise ValueError(f"{path} {lacks} {name}: it does not go with params.json")
        try:
            value = mx.array(archive[name])
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(f"{name} in {path} is damaged ({error}): run convert.py") from error
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{name} in {path} has the shape {value.shape}, params.json implies "
                f"{expected[name].shape}"
            )
        if mx.issubdtype(value.dtype, mx.floating):
            value = value.astype(dtype)
        mx.eval(value)  # here, so that no more than one array is held twice
        expected[name] = value
    archive.close()
    model.update(tree_unflatten(list(expected.items())))
    device.give_back_memory()


def read_adapter(path: str | Path, ranks: Ranks = ALONE) -> dict[str, np.ndarray]:
    """The LoRA matrices of rank 0's .npz file by parameter path.

    Raises ValueError when the file is damaged or holds anything else.
    """
    try:
        with np.load(io.BytesIO(ranks.read(path) or b"")) as archive:
            matrices = {name: archive[name] for name in archive.files}
    except Exception as error:  # a damaged archive raises almost anything
        raise ValueError(f"{path} is no adapter file ({error}): make one with --train") from error
    for name, matrix in matrices.items():
        if not ADAPTER_KEY.fullmatch(name):
            raise ValueError(f"{path} holds {name}, which is no LoRA matrix of wq or wv")
        if matrix.ndim != 2 or not np.issubdtype(matrix.dtype, np.floating):
            raise ValueError(f"{name} in {path} is not a matrix of floats")
        with np.errstate(over="ignore"):
            matrices[name] = matrix.astype(np.float32)
        if not np.isfinite(matrices[name]).all():
            raise ValueError(f"{name} in {path} is not finite: train again")
    if not matrices:
        raise ValueError(f"{path} holds no LoRA matrices: make them with --train")
    return matrices


def count_parameters(model: Model) -> int:
    """Parameters of the model; a quantized layer counts as the one that it stands for."""
    quantized = [m for m in model.modules() if isinstance(m, nn.QuantizedLinear)]
    packed = sum(v.size for m in quantized for v in m.parameters().values())
    unpacked = sum(m.scales.size * m.group_size for m in quantized)
    return sum(v.size for _, v in tree_flatten(model.parameters())) - packed + unpacked


# -------------------------------------------------------------------------------------------------
# The run


def run(args: argparse.Namespace, ranks: Ranks = ALONE) -> None:
    """Do what the flags ask for, in the order train, test, generate."""
    set_portions(training=args.train or args.test)
    mx.random.seed(args.seed)
    np.random.seed(args.seed)
    if device.ON_CPU and not device.FAST_BLAS:
        warn("MLX runs on its own, slow BLAS; on x86-64 Linux, pip install mkl")
    if args.resume_adapter_file and ranks.rank == 0:
        finish_save(args.resume_adapter_file)
    sets, model, tokenizer = prepare(args, ranks)
    train_set, val_set, test_set = sets
    adapter = adapter_to_load(args)
    if adapter is not None:
        load_adapter(model, adapter, ranks)
    elif args.train:
        add_lora(model, top_layers(model, args.lora_layers))
    say(f"Total parameters {count_parameters(model) / 1e6:.3f}M")
    if args.train:
        n_trainable = sum(v.size for _, v in tree_flatten(model.trainable_parameters()))
        say(f"Trainable parameters {n_trainable / 1e6:.3f}M")

    if args.train or args.test:
        say("Loading datasets")
        n_cut = sum(dset.cut(tokenizer, args.max_seq_length) for dset in sets if dset is not None)
        if n_cut:
            warn(f"{n_cut} texts are cut to {args.max_seq_length} tokens, see --max-seq-length")
    if args.train:
        if len(train_set) < args.batch_size:
            warn(f"a batch is {len(train_set)} texts, since there are no more for training")
        say("Training")
        if ranks.rank == 0:
            warn_of_another_run(args)
        announce(model, train_set, val_set, tokenizer, args, ranks.size)
        optimizer = optim.Adam(learning_rate=args.learning_rate)
        train(model, train_set, val_set, optimizer, loss, tokenizer, args, ranks)
    if args.test:
        say("Testing")
        test_loss = evaluate(
            model, test_set, loss, tokenizer, args.batch_size, args.test_batches, ranks=ranks
        )
        perplexity = math.inf if test_loss > 709 else math.exp(test_loss)  # float64 holds no more
        say(f"Test loss {test_loss:.3f}, Test ppl {perplexity:.3f}.")
    if args.prompt is not None and ranks.rank == 0:
        say("Generating")
        mx.random.seed(args.seed)  # the text depends on it alone, not on what came before
        generate(model, args.prompt, tokenizer, args)


def prepare(
    args: argparse.Namespace, ranks: Ranks
) -> tuple[tuple[Dataset | None, ...], Model, Tokenizer]:
    """The data sets, the model and the tokenizer, on each of the ranks.

    Raises ValueError, on all of them, where that fails on one, or where they are not the same.
    """
    prepared, problem, identity = (), None, {}
    try:
        check_arguments(args, ranks.size, writes=ranks.rank == 0)
        sets = load(args)  # before the model, since a mistake there shows at once
        say("Loading pretrained model")
        generating = not (args.train or args.test)
        dtype = DTYPES.get(args.dtype) or device.default_dtype(generating)
        prepared = sets, *load_model(args.model, dtype)
        if ranks.size == 1:
            return prepared
        identity = describe_input(args, sets)
    except USER_ERRORS as error:
        if ranks.size == 1:
            raise
        problem = str(error)[:600]  # which `gather` takes, however JSON spells it
    all_ranks = [json.loads(text) for text in ranks.gather(json.dumps([problem, identity]))]
    expected = all_ranks[0][1]
    for rank, (problem, identity) in enumerate(all_ranks):
        if problem is not None:
            raise ValueError(problem if rank == 0 else f"rank {rank}: {problem}")
        for name in expected:
            if identity[name] != expected[name]:
                raise ValueError(f"{name} of rank {rank} is not that of rank 0: give all the same")
    return prepared


def describe_input(args: argparse.Namespace, sets: tuple) -> dict[str, str]:
    """A digest of the data, the model and each flag, and whether this run goes on with another;
    only paths may differ among ranks.
    """
    folder = Path(args.model)
    files = [(folder / name).read_bytes() for name in ("params.json", "tokenizer.model")]
    texts = [list(dset) for dset in sets if dset is not None]
    described = {
        f"--{name.replace('_', '-')}": digest(repr(value).encode())
        for name, value in vars(args).items()
        if name not in ("data", "model", "adapter_file", "resume_adapter_file")
    }
    described["--resume-adapter-file"] = str(args.resume_adapter_file is not None)
    described["the data"] = digest(repr(texts).encode())
    described["the model"] = digest(b"".join([checksums(folder / "weights.npz"), *files]))
    return described


def announce(
    model: Model,
    train_set: Dataset,
    val_set: Dataset,
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    n_ranks: int,
) -> None:
    """Say what the training will do, and warn of what makes no sense together."""
    n_adapted = sum(isinstance(layer.attention.wq, LoRALinear) for layer in model.layers)
    n_tokens = sum(len(row) - 1 for row in train_set.encode(tokenizer))
    n_rows = min(args.batch_size, len(train_set))
    steps = len(train_set) // n_rows  # of an epoch, as in `iterate_batches`
    dtype = str(model.norm.weight.dtype).removeprefix("mlx.core.")
    on = f", {n_ranks} ranks," if n_ranks > 1 else ""
    for bits in {m.bits for m in model.modules() if isinstance(m, nn.QuantizedLinear)}:
        dtype += f", {bits} bits a weight"
    say(
        f"On {mx.default_device().type.name}{on} in {dtype}: LoRA in {n_adapted} of "
        f"{len(model.layers)} layers; {len(train_set)} texts, {n_tokens} tokens; {args.iters} "
        f"iterations of {n_rows}, {args.iters / steps:.2f} epochs"
    )
    if args.iters < steps:
        warn(f"--iters {args.iters} does not finish an epoch, which has {steps}")
    if len(val_set) > len(train_set):
        warn(f"the validation set has {len(val_set)} texts, the training set {len(train_set)}")
    if args.learning_rate > 1e-2:
        warn(f"--learning-rate {args.learning_rate} is high: 1e-5 to 1e-3 are usual for LoRA")


def warn_of_another_run(args: argparse.Namespace) -> None:
    """Warn of what another run wrote, and this one replaces."""
    adapter, source = Path(args.adapter_file), args.resume_adapter_file
    if source is not None and adapter.exists() and adapter.samefile(source):
        return
    own = [adapter] if adapter.is_file() and adapter.stat().st_size else []
    found = [*own, *find_siblings(adapter)]
    if found:
        names = ", ".join([str(found[0]), *(path.name for path in found[1:])])
        warn(f"another run's files are replaced: {names}")


def resuming_command(args: argparse.Namespace) -> str:
    """The command line of this run, going on from what it has saved."""
    flags = [*sys.argv[1:], "--resume-adapter-file", args.adapter_file]  # of two, the last counts
    return shlex.join(["python", sys.argv[0], *flags])


# Ends of a run to which all ranks come together.
COMMON_ENDS = (*USER_ERRORS, Stopped, FloatingPointError, NotSaved, SystemExit, KeyboardInterrupt)


def main() -> None:
    cli.open_closed_streams()
    with cli.exit_statuses(device.advice):
        if launched_rank():  # for all ranks but the first
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  open to the end
        try:
            with Ranks.join() as ranks:
                args = build_parser().parse_args()
                run(args, ranks)
        except Stopped as stop:
            cli.leave(128 + stop.signum, f"{stop}; go on with: {resuming_command(args)}")


if __name__ == "__main__":
    main()
