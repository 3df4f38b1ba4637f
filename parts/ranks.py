"""Several processes that train one model together: the group, its sums, and its watchdog.

`mlx.launch` starts the processes, called ranks, on one machine or on several. Each computes its
rows of every batch; MLX sums their gradients. But when a rank ends, MLX tells only its neighbours,
and nobody when a cable is pulled: a Watchdog ends the others.
"""

import argparse
import json
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from parts import chat, device, tokenizers  # before MLX, for its BLAS
from parts.files import digest
from parts.model_folder import checksums

import mlx.core as mx

RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")  # set by mlx.launch, and by mpirun
RENDEZVOUS_TIMEOUT = 20  # seconds until all ranks have to be there
PROBES = 5, 5, 3  # seconds of silence before the first, and between two; and how many may be lost
JOIN_TIMEOUT = 30  # seconds that MLX has to connect them
WELCOME, GOODBYE = b"welcome", b"goodbye"
MAX_GATHERED = 8192  # bytes of a text that `gather` sends


class Rendezvous(NamedTuple):
    """Where the ranks meet: MLX's backend, rank 0's host and a free port, the number of ranks."""

    backend: str
    host: str
    port: int
    size: int


def launched_rank() -> int | None:
    """Return this process's number among those that a launcher started; None without a launcher."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), None)


def rendezvous() -> Rendezvous | None:
    """Return where the ranks meet, as `mlx.launch` tells; None where it did not start this process.

    The port is one above the ports that MLX uses.
    """
    env = os.environ
    if "NCCL_HOST_IP" in env and "MLX_WORLD_SIZE" in env:
        port, size = int(env["NCCL_PORT"]) + 1, int(env["MLX_WORLD_SIZE"])
        return Rendezvous("nccl", env["NCCL_HOST_IP"], port, size)
    if "MLX_JACCL_COORDINATOR" in env:
        host, _, port = env["MLX_JACCL_COORDINATOR"].rpartition(":")
        devices = json.loads(Path(env["MLX_IBV_DEVICES"]).read_text())
        return Rendezvous("jaccl", host, int(port) + 1, len(devices))
    if "MLX_HOSTFILE" in env:
        nodes = json.loads(Path(env["MLX_HOSTFILE"]).read_text().strip() or '[["single:0"]]')
        addresses = [address.rpartition(":") for node in nodes for address in node]
        port = max(int(port) for *_, port in addresses) + 1
        return Rendezvous("ring", addresses[0][0], port, len(nodes))
    return None


class Watchdog:
    """Connections between rank 0 and each other rank, which end this process when one is lost.

    Nothing is sent on them until a rank leaves. The system closes a connection when the process
    at its other end ends, and probes one that is silent, so that a pulled cable shows too.

    saving: held while files are written, so that the watchdog does not end the process then.
    """

    def __init__(self, saving: threading.Lock):
        self.saving = saving
        self.rank_0_left = threading.Event()  # with a goodbye
        self._peers: dict[int, socket.socket] = {}

    def connect(self, rank: int, place: Rendezvous) -> None:
        """Connect rank 0 with all others, and start to watch. Raises OSError where rank 0's port is
        taken. Ends the process when a rank does not come in time.
        """
        deadline = time.monotonic() + RENDEZVOUS_TIMEOUT
        if rank == 0:
            self._accept_others(place, deadline)
        else:
            self._reach_rank_0(rank, place, deadline)
        idle = getattr(socket, "TCP_KEEPIDLE", None) or socket.TCP_KEEPALIVE  # Linux, macOS
        for other, peer in self._peers.items():
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            options = idle, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT
            for option, value in zip(options, PROBES, strict=True):
                peer.setsockopt(socket.IPPROTO_TCP, option, value)
            if rank == 0:
                with suppress(OSError):
                    peer.sendall(WELCOME)
            else:
                self._expect(WELCOME, other)
            threading.Thread(target=self._expect, args=(GOODBYE, other), daemon=True).start()

    def _accept_others(self, place: Rendezvous, deadline: float) -> None:
        try:
            server = socket.create_server((place.host, place.port), backlog=place.size)
        except OSError as error:
            raise OSError(
                f"rank 0 cannot wait at {place.host}:{place.port} ({error}): is another run "
                "there? mlx.launch takes another port with -p"
            ) from error
        while len(self._peers) < place.size - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                peer, _ = server.accept()
                peer.settimeout(1)
                self._peers[int(peer.recv(8))] = peer
            except TimeoutError:
                if time.monotonic() > deadline:
                    self._end(min(set(range(1, place.size)) - self._peers.keys()))
            except (OSError, ValueError):  # it has left again, or is no rank
                continue
        server.close()

    def _reach_rank_0(self, rank: int, place: Rendezvous, deadline: float) -> None:
        while not self._peers:
            try:
                peer = socket.create_connection((place.host, place.port), timeout=5)
                peer.sendall(b"%d" % rank)
                self._peers[0] = peer
            except OSError:
                if time.monotonic() > deadline:
                    self._end(0)
                time.sleep(0.1)

    def leave(self) -> None:
        """Tell the others that this rank ends as they do."""
        for peer in self._peers.values():
            with suppress(OSError):
                peer.sendall(GOODBYE)

    def _expect(self, word: bytes, other: int) -> None:
        """Wait for the other's `word`. End this process when anything else comes."""
        message = b""
        with suppress(OSError):
            message = self._peers[other].recv(len(word))
        if message != word:
            self._end(int(message or other), told=bool(message))
        if word == GOODBYE:
            self.rank_0_left.set()

    def _end(self, lost: int, told: bool = False) -> NoReturn:
        """End this process because the rank `lost` is, and tell the other ranks which.

        told: another rank has told this one, and printed the line.
        """
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


class Ranks:
    """The processes that compute one run together, of which this is `rank` of `size`. `Ranks()` is
    one process alone; its sums and gathers cost nothing.

    local_size: the ranks, with this one, that run on this one's cores.
    sum_on_gpu: whether NCCL sums, which is work of the GPU's own.
    saving: held while files are written.

    As a context manager around a run, it tells the others when this rank ends as they do.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.local_size = 0, 1, 1
        self.sum_on_gpu = False
        self.saving = threading.Lock()
        self._group: mx.distributed.Group | None = None
        self._watchdog = Watchdog(self.saving)
        self._shared_errors: tuple[type[BaseException], ...] = ()

    @classmethod
    def join(cls, shared_errors: tuple[type[BaseException], ...] = ()) -> "Ranks":
        """Meet the other ranks that the launcher started.

        shared_errors: what all ranks raise together, so that rank 0 alone needs to tell of it.
        Raises RuntimeError or OSError where they cannot meet. Ends the process when one of them
        does not come.
        """
        ranks, rank, place = cls(), launched_rank(), rendezvous()
        if rank is None or (place and place.size == 1):
            return ranks
        ranks._shared_errors = shared_errors
        if place:
            ranks._watchdog.connect(rank, place)
        backend = place.backend if place else "mpi"  # which ends all ranks itself when one ends
        device.limit_command_buffers(training=True)
        signal.alarm(JOIN_TIMEOUT)  # ends this process; MLX waits for ever, and blocks all threads
        try:
            ranks._group = mx.distributed.init(strict=True, backend=backend)
        except RuntimeError as error:
            sys.stderr = sys.__stderr__
            raise RuntimeError(f"rank {rank} does not reach the others: {error}") from error
        signal.alarm(0)
        ranks.rank, ranks.size = ranks._group.rank(), ranks._group.size()
        ranks.sum_on_gpu = backend == "nccl"
        ranks.local_size = ranks._count_local()
        return ranks

    def _count_local(self) -> int:
        """Count the ranks that run on the cores of this one, on the same boot of one machine."""
        boot = Path("/proc/sys/kernel/random/boot_id")  # of this machine, whatever its names
        machine = boot.read_text() if boot.exists() else platform.node()
        machines = self.gather(machine + digest(repr(device.available_cores()).encode()))
        return machines.count(machines[self.rank])

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if self.size == 1:
            return
        if error is None or self._is_shared(error):
            self._watchdog.leave()
        else:
            time.sleep(1)  # if another's end is the cause, the watchdog says so and ends this one
            sys.stderr = sys.__stderr__

    def _is_shared(self, error: BaseException) -> bool:
        """Whether the others end for the same reason. If so, rank 0 alone tells of it."""
        if self.rank == 0:
            return isinstance(error, self._shared_errors)
        return self._watchdog.rank_0_left.wait(2)

    # Collectives: every rank calls them, in the same order.

    def sum(self, x: mx.array) -> mx.array:
        """Return the sum of all ranks' `x`, in one message. It is still to be computed."""
        return x if self._group is None else mx.distributed.all_sum(x, group=self._group)

    def sum_values(self, *values: float) -> list[float]:
        """Return each value's sum over all ranks, in float32 where there are several. Waits for
        all ranks.
        """
        if self.size == 1:
            return list(values)
        return self.sum(mx.array([float(value) for value in values])).tolist()

    def gather(self, text: str) -> list[str]:
        """Return the texts of all ranks, each of at most 8 KiB in UTF-8."""
        rows = np.zeros((self.size, MAX_GATHERED), np.uint8)
        content = np.frombuffer(text.encode(), np.uint8)
        rows[self.rank, : len(content)] = content
        return [bytes(row).rstrip(b"\0").decode() for row in np.array(self.sum(mx.array(rows)))]

    def read(self, path: str | Path) -> bytes | None:
        """Return the content of rank 0's file, None where it is missing. The others need no file.

        Raises OSError.
        """
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

    def check_same(self, problem: str | None, inputs: dict[str, str]) -> None:
        """Raise ValueError on all ranks where one has a `problem`, or other `inputs` than rank 0.

        inputs: what has to be the same everywhere, by the name that the error gives it.
        """
        problem = problem and problem[:600]  # which `gather` takes, however JSON spells it
        all_ranks = [json.loads(text) for text in self.gather(json.dumps([problem, inputs]))]
        expected = all_ranks[0][1]
        for rank, (problem, inputs) in enumerate(all_ranks):
            if problem is not None:
                raise ValueError(problem if rank == 0 else f"rank {rank}: {problem}")
            for name in expected:
                if inputs[name] != expected[name]:
                    raise ValueError(
                        f"{name} of rank {rank} is not that of rank 0: give all the same"
                    )


SINGLE = Ranks()


def on_each_stream(
    streams: list[mx.Stream], function: Callable, *batch: mx.array, ranks: Ranks = SINGLE
) -> list:
    """Split a batch's rows among all streams of all ranks. Call `function` with the rows of each of
    this rank's streams, and return the results. A stream without rows has none.
    """
    results = []
    for stream, rows in split_rows(streams, batch, ranks):
        with mx.stream(stream):
            results.append(function(*rows))
    return results


def split_rows(
    streams: list[mx.Stream], batch: tuple[mx.array, ...], ranks: Ranks
) -> Iterator[tuple[mx.Stream, list[mx.array]]]:
    """Yield each of this rank's streams that has rows of a batch, and these."""
    n_splits = len(streams) * ranks.size
    for first, stream in zip(range(ranks.rank, len(batch[0]), ranks.size), streams, strict=False):
        yield stream, [array[first::n_splits] for array in batch]


def input_digests(args: argparse.Namespace, data: list[str | None]) -> dict[str, str]:
    """Return a digest of the data, of the model and of each flag, and whether this run resumes
    another, for `Ranks.check_same`. Only paths may differ among ranks. Raises OSError.

    data: digests of each data set.
    """
    folder = Path(args.model)
    beside = [folder / name for name in ("params.json", *tokenizers.FILES, *tokenizers.BESIDE)]
    beside.append(folder / chat.FILE)
    files = [path.read_bytes() for path in beside if path.is_file()]
    inputs = {
        f"--{name.replace('_', '-')}": digest(repr(value).encode())
        for name, value in vars(args).items()
        if name not in ("data", "model", "adapter_file", "resume_adapter_file", "prompts")
    }
    inputs["--resume-adapter-file"] = str(args.resume_adapter_file is not None)
    inputs["the data"] = digest(repr(data).encode())
    inputs["the model"] = digest(b"".join([checksums(folder / "weights.npz"), *files]))
    return inputs
