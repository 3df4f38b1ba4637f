"""Which device computes, and what each wants: the BLAS, streams and threads, memory.

Import it before MLX, because it loads the BLAS that MLX is to use. Read `device.ON_CPU` as an
attribute of the module, so that a test has one lever.

What differs on CUDA: kernels of the suite's own (`ops_cuda` in training, `decoder_cuda` in
decoding, both compiled by `nvrtc`), a training's `joined_layers`, limits on the work that waits, a
cache of graphs for many lengths, and NCCL's sum within the step. Other operations are MLX's, as on
Metal. A CPU's are in `ops_cpu`; where it trains in float32, or decodes many rows, NumPy computes
(`numpy_training`, `decoder_batch_cpu`), which takes a twentieth of MLX's time for exponentials.
"""

import ctypes
import importlib.metadata
import math
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path


def load_fast_blas() -> ctypes.CDLL | None:
    """Load Intel's MKL, where it is installed, in place of the BLAS that MLX's Linux wheel bundles.

    The bundled one is the reference implementation, some fifty times slower. The dynamic linker
    takes the first `cblas_sgemm` that it meets, so this has to run before MLX is first imported.
    Returns None where there is no MKL; macOS and CUDA do not need it.
    """
    try:
        files = importlib.metadata.files("mkl") or []
        library = next(f.locate() for f in files if f.name.startswith("libmkl_rt.so"))
        return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except (importlib.metadata.PackageNotFoundError, StopIteration, OSError):
        return None


def free_memory() -> int | None:
    """Return the bytes of memory that processes can still have; None where Linux does not tell."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1])


@lru_cache  # once a process
def keep_freed_memory() -> None:
    """Have the C library of Linux keep the memory of freed arrays for others, in pages of 2 MiB. By
    default it returns that of large ones to the system, which has to clear pages for each new one;
    and products wait for the addresses of pages of 4 KiB. Call it before there are arrays.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    for setting, value in ((trim_threshold, -1), (mmap_max, 0), (arena_max, 1)):
        libc.mallopt(setting, value)
    # One large block, none of which is touched: when it is freed, the heap has its addresses.
    libc.malloc.restype, size, page = ctypes.c_void_p, (free_memory() or 0) // 2, 2**21
    block = libc.malloc(ctypes.c_size_t(size))
    if block:
        start, use_huge_pages = -(-block // page) * page, 14
        n_bytes = max(0, block + size - start)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(n_bytes), use_huge_pages)
        libc.free(ctypes.c_void_p(block))


FAST_BLAS = load_fast_blas()

import mlx.core as mx  # noqa: E402

QUEUE_ROOM = 350_000_000  # bytes that work waiting for CUDA may hold, besides what a step needs
WITHOUT_BFLOAT16 = re.compile(r"applegpu_g1[34]")  # Apple's M1 and M2, which emulate it

# For tests: `MLX_LORA_DEVICE=metal` has a CPU take the path of a Mac's GPU, with all operations of
# it, in float32 unless told otherwise, as a CPU has no fast product in less.
TURNED = os.environ.get("MLX_LORA_DEVICE") == "metal"
ON_CPU = mx.default_device() == mx.Device(mx.cpu) and not TURNED


def has_slow_blas() -> bool:
    """Whether a CPU computes with the BLAS that MLX's wheel bundles."""
    return ON_CPU and not FAST_BLAS


def has_cuda() -> bool:
    """Whether an NVIDIA GPU computes. A GPU without CUDA is Metal's."""
    return not ON_CPU and mx.cuda.is_available()


def has_metal() -> bool:
    """Whether a Mac's GPU computes, or a CPU in its place."""
    return not ON_CPU and not mx.cuda.is_available()


if ON_CPU:
    keep_freed_memory()
    # MLX then queues the work of all streams in turns, not that of one after that of another.
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1000")
elif has_cuda():
    # Keep the graphs that each length of a batch takes, rather than make them for each batch.
    os.environ.setdefault("MLX_CUDA_GRAPH_CACHE_SIZE", "10000")


# -------------------------------------------------------------------------------------------------
# Streams


def available_cores() -> list[int]:
    """Return the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count()))


def open_streams(n: int, local_size: int = 1) -> list[mx.Stream]:
    """Return streams to split a batch among. On a CPU, where MLX runs a stream on one thread: at
    most `n`, and at most this process's share of the cores, which `local_size` processes split; the
    threads of the BLAS are split among the streams. On a GPU: the default stream.
    """
    if not ON_CPU:
        return [mx.default_stream(mx.default_device())]
    n_cores = len(available_cores())
    n = min(n, max(1, n_cores // local_size))
    if FAST_BLAS:
        FAST_BLAS.MKL_Set_Num_Threads(max(1, n_cores // (n * local_size)))
    return [mx.new_stream(mx.cpu) for _ in range(n)]


def core_streams() -> list[mx.Stream]:
    """Return a new stream for each core of a CPU, where MLX runs a stream on one thread, or one for
    a GPU. Unlike `open_streams`, it leaves the BLAS as it is.
    """
    n_streams = len(available_cores()) if ON_CPU else 1
    return [mx.new_stream(mx.default_device()) for _ in range(n_streams)]


def limit_command_buffers(training: bool) -> None:
    """Limit the megabytes of arrays that one command buffer of CUDA may touch, unless the user has.
    Call it before MLX computes anything.

    Small buffers hold less memory while they wait. Between two the GPU idles, so that generating
    takes one for all layers.
    """
    if has_cuda():  # Metal would heed it as well
        os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "200" if training else "20000")


def compiled(function: Callable, **state: list) -> Callable:
    """Return the function as `mx.compile` makes it, which joins a GPU's small kernels; on a CPU,
    where that gains nothing and needs a C++ compiler, return it as it is.

    state: its `inputs` and `outputs`.
    """
    return function if ON_CPU else mx.compile(function, **state)


# -------------------------------------------------------------------------------------------------
# Memory


def default_dtype(generating: bool = False) -> mx.Dtype:
    """Return what `--dtype auto` computes in: float32 on a CPU, few of which have fast products in
    half precision, and bfloat16 on a GPU, which cannot overflow where float16 does. To generate, a
    GPU that has no bfloat16 takes float16.
    """
    if mx.default_device() == mx.Device(mx.cpu):  # also in the place of a GPU
        return mx.float32
    lacks_it = WITHOUT_BFLOAT16.match(mx.device_info()["architecture"])
    return mx.float16 if generating and lacks_it else mx.bfloat16


@lru_cache
def fast_dtypes() -> set[mx.Dtype]:
    """Return the types in which a CPU's BLAS has fast products."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if FAST_BLAS and cpuinfo.exists() else set()
    return {mx.float32, mx.bfloat16} if "amx_bf16" in flags else {mx.float32}


def working_set() -> int | None:
    """Return the bytes that macOS recommends as its GPU's most; None for other devices."""
    return mx.device_info().get("max_recommended_working_set_size") if has_metal() else None


def check_memory(needed: int) -> None:
    """Raise MemoryError when the memory lacks the bytes that the weights need: of a Linux machine
    that computes on its CPU, where the system would kill the process, or of a Mac's GPU.
    """
    available, whose = working_set(), " for the GPU"
    if available is None and mx.default_device() == mx.Device(mx.cpu):
        available, whose = free_memory(), ""
    if available is not None and needed > available:
        instead = ", or give --dtype bfloat16, which is slower on a CPU" if ON_CPU else ""
        raise MemoryError(
            f"the weights take {needed / 2**30:.1f} GiB of memory and {available / 2**30:.1f} are "
            f"free{whose}: convert the model with -q{instead}"
        )


def give_back_memory() -> None:
    """On Metal, return the memory of freed arrays to the system; MLX keeps it for others of the
    same size. Call it when those that follow have other sizes.
    """
    if has_metal():
        mx.clear_cache()


def peak_memory() -> int:
    """Return the most bytes that this process has held: on a CPU, where NumPy computes, too, all of
    its memory; on a GPU what MLX's arrays have taken since `mx.reset_peak_memory`.
    """
    if not ON_CPU:
        return mx.get_peak_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def wired() -> Iterator[None]:
    """On Metal, keep what is computed with in memory, rather than make it ready for each token. On
    macOS before 15 this does nothing.
    """
    limit = working_set()
    if limit is None:
        yield
        return
    before = mx.set_wired_limit(limit)
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)


@contextmanager
def limits_restored() -> Iterator[None]:
    """At the end, restore MLX's limits of memory and of freed memory."""
    setters = mx.set_memory_limit, mx.set_cache_limit
    limits = [set_limit(0) for set_limit in setters]  # which returns the one before
    for set_limit, limit in zip(setters, limits, strict=True):
        set_limit(limit)
    try:
        yield
    finally:
        for set_limit, limit in zip(setters, limits, strict=True):
            set_limit(limit)


def bounded(start: Callable, state: list, queues: bool = True) -> Callable:
    """Return a step that on a GPU leaves MLX no more memory than its longest batch needs.

    `start` takes the inputs (B, L) of a batch first, and returns arrays that are still being
    computed, as `state` is. A batch longer than all before is waited for, and shows the need. With
    CUDA the limit is on the work that waits, where a step `queues` behind another: rather than
    queue more, MLX waits. With Metal it is on the memory of freed arrays, since those of one length
    do not serve another.
    """
    longest = math.inf if ON_CPU or (has_cuda() and not queues) else 0

    def start_bounded(inputs: mx.array, *others: mx.array, **options) -> object:
        nonlocal longest
        if inputs.shape[1] <= longest:
            return start(inputs, *others, **options)
        mx.eval(state)
        if has_cuda():  # what a step takes at least: none of its work may queue up
            mx.set_memory_limit(mx.get_active_memory())
        else:
            mx.clear_cache()
        result = start(inputs, *others, **options)
        mx.eval(result, state)
        if has_cuda():
            mx.set_memory_limit(mx.get_peak_memory() + QUEUE_ROOM)
        else:
            mx.set_cache_limit(mx.get_peak_memory() - mx.get_active_memory())
        longest = inputs.shape[1]
        return result

    return start_bounded


# -------------------------------------------------------------------------------------------------
# Errors. MLX raises a RuntimeError when an array is waited for whose work has failed, or for which
# there is no memory.

NO_MEMORY = re.compile(r"out of memory|insufficient memory|unable to allocate|\[malloc", re.I)
METAL_ENDED_IT = re.compile(r"\[METAL\]|command buffer execution failed", re.I)
LESS_MEMORY = (
    "give a smaller --batch-size or --max-seq-length, or --grad-checkpoint, or convert the model "
    "with -q"
)
LESS_WORK = (
    "macOS ends work of the GPU that takes long while it draws the display: turn the display off, "
    "set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1, give a smaller --batch-size or --max-seq-length, or set "
    "MLX_SDPA_VJP_FALLBACK=1 if it is in training"
)


def advice(error: BaseException) -> str | None:
    """Return what helps against an error of the device; None for other errors."""
    message = str(error)
    if NO_MEMORY.search(message):
        return LESS_MEMORY
    return LESS_WORK if METAL_ENDED_IT.search(message) else None
