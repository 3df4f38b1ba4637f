"""Which device computes, and what each wants: the BLAS, streams and threads, memory.

Import it before MLX, because it loads the BLAS that MLX is to use. Read `device.ON_CPU` as an
attribute of the module, so that a test has one lever.
"""

import ctypes
import importlib.metadata
import os
import sys
from collections.abc import Callable


def load_fast_blas() -> ctypes.CDLL | None:
    """Load Intel's MKL, where it is installed, in place of the BLAS that MLX's Linux wheel bundles.

    The bundled one is the reference implementation, some fifty times slower. The dynamic linker
    takes the first `cblas_sgemm` that it meets, so this has to run before MLX is first imported.
    Gives None where there is no MKL; macOS and CUDA do not need it.
    """
    try:
        files = importlib.metadata.files("mkl") or []
        library = next(f.locate() for f in files if f.name.startswith("libmkl_rt.so"))
        return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except (importlib.metadata.PackageNotFoundError, StopIteration, OSError):
        return None


def keep_freed_memory() -> None:
    """Have the C library of Linux keep the memory of freed arrays for others. By default it gives
    that of large ones back to the system, which has to clear pages for each new one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim_threshold, mmap_max, arena_max = -1, -4, -8
        for setting, value in ((trim_threshold, 2**31 - 1), (mmap_max, 0), (arena_max, 1)):
            mallopt(setting, value)


FAST_BLAS = load_fast_blas()

import mlx.core as mx  # noqa: E402

# For tests: `MLX_LORA_DEVICE=metal` has a CPU take the path of a Mac's GPU. It computes the same,
# in the same dtypes and with the same operations, only more slowly.
TURNED = os.environ.get("MLX_LORA_DEVICE") == "metal"
ON_CPU = mx.default_device() == mx.Device(mx.cpu) and not TURNED


def has_cuda() -> bool:
    """Whether an NVIDIA GPU computes. A GPU without CUDA is Metal's."""
    return not ON_CPU and mx.cuda.is_available()


if ON_CPU:
    # MLX then queues the work of all streams in turns, not that of one after that of another.
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1000")
elif has_cuda():
    # The graphs that each length of a batch takes are kept, not made anew for each batch.
    os.environ.setdefault("MLX_CUDA_GRAPH_CACHE_SIZE", "10000")


# -------------------------------------------------------------------------------------------------
# Streams


def available_cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count()))


def open_streams(n: int, n_sharing: int = 1) -> list[mx.Stream]:
    """Streams to share a batch out among. On a CPU, where MLX runs a stream on one thread: at most
    `n`, and at most this process's share of the cores, which `n_sharing` processes have; the
    threads of the BLAS are divided among them. On a GPU: the default stream.
    """
    if not ON_CPU:
        return [mx.default_stream(mx.default_device())]
    keep_freed_memory()
    n_cores = len(available_cores())
    n = min(n, max(1, n_cores // n_sharing))
    if FAST_BLAS:
        FAST_BLAS.MKL_Set_Num_Threads(max(1, n_cores // (n * n_sharing)))
    return [mx.new_stream(mx.cpu) for _ in range(n)]


def set_portions(training: bool) -> None:
    """Set how many megabytes of arrays the work that CUDA is handed at once may touch, unless the
    user has. To be called before MLX computes anything.

    Small portions hold less memory while they wait. Between two the GPU idles, so that generating
    takes one for all layers.
    """
    if has_cuda():  # Metal would heed it as well
        os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "200" if training else "20000")


def compiled(function: Callable, **state: list) -> Callable:
    """The function as `mx.compile` makes it, which joins a GPU's small kernels; on a CPU, where
    that gains nothing and needs a C++ compiler, as it is. `state`: `inputs` and `outputs` of it.
    """
    return function if ON_CPU else mx.compile(function, **state)
