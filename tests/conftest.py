"""What several tests need: small models, real texts, and a way to call a script as a user does."""

import importlib
import inspect
import io
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mistral_common
import numpy as np
import pytest
from hypothesis import settings
from sentencepiece import SentencePieceTrainer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # an M5 would compute float32 with ten bits less
# Threads of a BLAS that wait for their next product leave the cores to the other tests. By default
# they spin for 0.2 s after each one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from parts import device  # noqa: E402  before MLX, for its BLAS

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from models import Model, ModelArgs  # noqa: E402

# Another test may run at the same time, and keep an example waiting.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

# A shell starts what it puts into the background deaf to Ctrl-C, and nohup to a terminal that is
# closed; what the tests start would be too.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

# What announces a run in the device's own dtype: "On cpu in float32".
DTYPE = str(device.default_dtype()).removeprefix("mlx.core.")
ON_DEVICE = f"On {mx.default_device().type.name} in {DTYPE}"

# Mistral 7B v0.1's own tokenizer.model, 32,000 pieces (Apache-2.0).
MISTRAL_TOKENIZER = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"

# A CPU in Metal's place trains some ten times as slowly, and is waited for that much longer.
SLOWNESS = 10 if device.TURNED else 1

# What a training writes.
RUN_FILES = [
    "adapters.best.npz", "adapters.log.jsonl", "adapters.npz", "adapters.png", "adapters.state.npz",
]  # fmt: skip

TINY = {
    "dim": 64,
    "n_layers": 3,
    "head_dim": 16,
    "hidden_dim": 96,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 32000,
    "rope_theta": 10000.0,
}
QUICK = {**TINY, "vocab_size": 1000}  # most of a step's time goes into the vocabulary

# A RoPE that is scaled as Llama 3's, from a context that tests exceed.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Meanwhile, `folder` is a real file system of its own, of this size, such as "6m"."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def run_script(script: str, *arguments: str | Path, cwd: Path | None = None, **env: str):
    """Run a script from the shell; gives the finished process with its output as text."""
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )


def call_script(script: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    """What `run_script` gives, from the script's `main` in this process: it starts at once, while
    a process of its own imports torch for seconds.
    """
    main = importlib.import_module(script.removesuffix(".py")).main
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    handlers = {signum: signal.getsignal(signum) for signum in signals}
    before = sys.argv, sys.stdout, sys.stderr
    outputs = [io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2)]
    sys.argv, sys.stdout, sys.stderr = [script, *map(str, arguments)], *outputs
    status = None
    try:
        main()
    except SystemExit as exit:
        status = exit.code
    finally:
        sys.argv, sys.stdout, sys.stderr = before
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    for output in outputs:
        output.flush()
    texts = [output.buffer.getvalue().decode() for output in outputs]
    return subprocess.CompletedProcess([script, *arguments], status or 0, *texts)


def launch_ranks(n: int, *arguments: str | Path, cwd: Path | None = None, **env: str):
    """Run lora.py on `n` ranks of this machine by `mlx.launch`; gives the finished launcher with
    its output as text.

    The launcher polls without a pause while a rank's standard input has room, and at the end of its
    own. So it is given more than the pipes hold, and no end.
    """
    launcher = subprocess.Popen(
        [Path(sys.executable).with_name("mlx.launch"), "-n", str(n)]
        + ["-p", str(random.randrange(20000, 32000, 10)), "--"]
        + [sys.executable, ROOT / "lora.py", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    launcher.stdin.write("\n" * 2**18)
    launcher.stdin.flush()
    launcher.wait(300 * SLOWNESS)
    output, errors = launcher.stdout.read(), launcher.stderr.read()
    with suppress(BrokenPipeError):
        launcher.communicate()
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, output, errors)


def wait_for(process: subprocess.Popen, text: str) -> None:
    """Read the standard output up to a line that holds `text`."""
    assert any(text in line for line in process.stdout), process.stderr.read()


def write_model(folder: Path, model: Model, **params) -> Path:
    """Write a folder such as convert.py makes, with Mistral's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(MISTRAL_TOKENIZER, folder / "tokenizer.model")
    weights = {
        name: np.array(value if value.dtype == mx.uint32 else value.astype(mx.float16))
        for name, value in tree_flatten(model.parameters())
    }
    np.savez(folder / "weights.npz", **weights)
    config = {name: getattr(model.args, name) for name in TINY}
    (folder / "params.json").write_text(json.dumps({**config, **params}))
    return folder


def write_quick_model(folder: Path, model: Model, **params) -> Path:
    """Write a model of QUICK's vocabulary, with a tokenizer of as many pieces."""
    write_model(folder, model, **params)
    write_quick_tokenizer(folder)
    return folder


def write_quick_tokenizer(folder: Path) -> None:
    """Write a tokenizer of QUICK's vocabulary, made for the texts of `docstrings`."""
    tokenizer = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts_of_mlx()),
        model_writer=tokenizer,
        model_type="bpe",
        vocab_size=QUICK["vocab_size"],
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(tokenizer.getvalue())


def texts_of_mlx() -> list[str]:
    """The first 200 characters of the docstrings of `mlx.nn`, in a fixed order, each once."""
    texts = {inspect.getdoc(getattr(nn, name)) for name in dir(nn) if not name.startswith("_")}
    return sorted(text[:200] for text in texts if text)


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "index: asks pip's index, and is skipped without one")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random model of three layers, as convert.py would write it, with few tokens."""
    mx.random.seed(7)
    model = Model(ModelArgs(**QUICK))
    model.output.weight = model.output.weight * 4  # it has more to learn
    return write_quick_model(tmp_path_factory.mktemp("tiny"), model)


@pytest.fixture(scope="session")
def docstrings() -> list[str]:
    return texts_of_mlx()


@pytest.fixture(scope="session")
def data(tmp_path_factory, docstrings) -> Path:
    """A data folder with 24 records for training, 7 for validation and 7 for testing."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "train.jsonl", docstrings[:24])
    write_jsonl(folder / "valid.jsonl", docstrings[24:31])
    write_jsonl(folder / "test.jsonl", docstrings[31:38])
    return folder


# For each line that it reads, runs a script in a process of its own, with all loaded once.
IN_FORKS = """
import importlib, os, sys
script = importlib.import_module(sys.argv[1])
del sys.argv[1]
for _ in sys.stdin:
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr
        script.main()
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@contextmanager
def script_in_forks(script: str, *args) -> Iterator[Callable[..., float]]:
    """Yield `run_once(kill_after=60)`, which runs a script, such as "convert", with these
    arguments, kills it after so many seconds, and returns the seconds that it took.
    """
    with subprocess.Popen(
        [sys.executable, "-c", IN_FORKS, script, *map(str, args)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    ) as forks:

        def run_once(kill_after: float = 60) -> float:
            forks.stdin.write(b"\n")
            child, start = int(forks.stdout.readline()), time.monotonic()
            if not select.select([forks.stdout], [], [], kill_after)[0]:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(child, signal.SIGKILL)
            assert int(forks.stdout.readline()) in (0, signal.SIGKILL)
            return time.monotonic() - start

        yield run_once
        forks.stdin.close()
