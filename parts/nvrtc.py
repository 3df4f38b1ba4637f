"""CUDA kernels in source text: read them, compile them, ask what the GPU has.

MLX's own way, `mx.fast.cuda_kernel`, takes two seconds in each process, most of it for headers.
Here NVIDIA's run-time compiler (NVRTC), which MLX brings, makes the code, and
`mx.fast.precompiled_cuda_kernel` launches it.
"""

import ctypes
import logging
from functools import lru_cache
from pathlib import Path

from parts import device  # noqa: F401  before MLX, for its BLAS

import mlx.core as mx

FOLDER = Path(__file__).parent
# What `Number` of a kernel is; the first two are classes of numbers.cuh.
NUMBER = {mx.float16: "Float16", mx.bfloat16: "Bfloat16", mx.float32: "float"}
# Numbers of `CUdevice_attribute` of CUDA's driver, for `attribute`.
MULTIPROCESSORS = 16
MAX_SHARED_MEMORY = 97  # bytes, at most, that a block can ask for

LOG = logging.getLogger(__name__)


def attribute(number: int) -> int:
    """A property of the GPU, by its number in `CUdevice_attribute` of CUDA's driver."""
    value = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(value), number, 0)
    return value.value


@lru_cache
def read_source(*names: str) -> str:
    """The text of the kernels in these files of this folder, after that of numbers.cuh. An error of
    the compiler names the file and the line.
    """
    texts = ((file, (FOLDER / file).read_text("utf-8")) for file in ("numbers.cuh", *names))
    return "".join(f'#line 1 "parts/{file}"\n{text}' for file, text in texts)


def load_library(*names: str) -> ctypes.CDLL | None:
    """The first of these shared libraries that is found, or None."""
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@lru_cache
def compile_kernels(source: str, constants: tuple[tuple[str, object], ...]) -> bytes | None:
    """The code of kernels for this GPU, with `constants` as macros.

    Returns None where there is no compiler, or where it refuses the source, as it does when a
    `static_assert` fails. What it says is then logged as DEBUG.
    """
    compiler = load_library("libnvrtc.so.13", "libnvrtc.so.12")
    if not compiler:
        return None
    options = [f"--gpu-architecture={mx.device_info()['architecture']}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in constants]
    values = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    compiler.nvrtcCreateProgram(ctypes.byref(program), source.encode(), None, 0, None, None)
    try:
        if compiler.nvrtcCompileProgram(program, len(options), values):
            compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            message = ctypes.create_string_buffer(size.value)
            compiler.nvrtcGetProgramLog(program, message)
            LOG.debug("%s", message.value.decode(errors="replace"))
            return None
        compiler.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        compiler.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))
