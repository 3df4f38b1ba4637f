"""The CUDA kernel of models.py, run on a CPU: compiled by g++ as it stands, but for a few lines of
assembly, with a process for each block and a thread for each of its threads.
"""

import ctypes
import mmap
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import models

import mlx.core as mx
import mlx.nn as nn

import lora

N_BLOCKS, THREADS = 5, 64
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux"
)

BEFORE = """
#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <thread>
#include <vector>
#include <sys/wait.h>
#include <unistd.h>

#define __device__
#define __global__
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static

using std::min, std::max;
struct Index { int x; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint4 { unsigned x, y, z, w; };

static thread_local Index threadIdx;
static Index blockIdx, gridDim;
static std::barrier<> block(THREADS);
static std::barrier<> warps[] = {std::barrier<>(32), std::barrier<>(32)};
static float exchanged[THREADS];
static_assert(THREADS == 64);

void __syncthreads() { block.arrive_and_wait(); }
void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
template <class T> T atomicAdd(T* to, T n) { return std::atomic_ref(*to).fetch_add(n); }
float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
float __expf(float x) { return std::exp(x); }
float rsqrtf(float x) { return 1 / std::sqrt(x); }
template <class T> T __ldcg(const T* from) { return *from; }
template <class T> T __ldcs(const T* from) { return *from; }

float __shfl_xor_sync(unsigned, float x, int distance) {
    auto& warp = warps[threadIdx.x / 32];
    exchanged[threadIdx.x] = x;
    warp.arrive_and_wait();
    float other = exchanged[threadIdx.x ^ distance];
    warp.arrive_and_wait();
    return other;
}
"""
ASSEMBLY = {
    r'asm\("cvt\.rn\.f16\.f32.*?\);': "bits = std::bit_cast<unsigned short>(_Float16(x));",
    r'asm\("cvt\.f32\.f16.*?\);': "x = std::bit_cast<_Float16>(bits);",
    r'asm\("cvt\.rn\.bf16\.f32.*?\);': "bits = std::bit_cast<unsigned>(x) >> 16;",
    r'asm volatile\("ld\.acquire.*?\);': "now = std::atomic_ref(*arrived).load();",
    r"extern __shared__ Vector shared\[\];": "static Vector shared[65536 / sizeof(Vector)];",
}
BEHIND = """
struct Address {
    void* address;
    template <class T> operator T*() const { return static_cast<T*>(address); }
};

extern "C" void run(int n_blocks, void** at, int ranks, int capacity) {
    gridDim.x = n_blocks;
    for (int i = 0; i < n_blocks; i++) {
        if (fork()) continue;
        blockIdx.x = i;
        std::vector<std::thread> threads;
        for (int j = 0; j < THREADS; j++) {
            threads.emplace_back([=] {
                threadIdx.x = j;
                decoder_layer(ARGUMENTS, ranks, capacity);
            });
        }
        for (auto& thread : threads) thread.join();
        _exit(0);
    }
    for (int i = 0; i < n_blocks; i++) wait(nullptr);
}
"""


@pytest.fixture
def emulated_cuda(monkeypatch, tmp_path) -> list[int]:
    """Have `models` take this machine for one with CUDA; gives the ranks of each layer that ran."""
    layers = []

    def compile_with_gxx(source: str, constants: tuple[tuple[str, object], ...]) -> str | None:
        for pattern, replacement in ASSEMBLY.items():
            source, n = re.subn(pattern, replacement, source, flags=re.DOTALL)
            assert n == 1, pattern
        n_arrays = re.search(r"void decoder_layer\((.*?)\)", source, re.DOTALL)[1].count("*")
        arguments = ", ".join(f"Address{{at[{i}]}}" for i in range(n_arrays))
        path = tmp_path / "kernel.cpp"
        path.write_text(BEFORE + source + BEHIND.replace("ARGUMENTS", arguments))
        options = ["-std=c++20", "-O1", "-w", "-pthread", "-shared", "-fPIC"]
        options += [f"-D{name}={value}" for name, value in constants]
        command = ["g++", *options, str(path), "-o", str(path.with_suffix(".so"))]
        refused = subprocess.run(command, capture_output=True).returncode
        return None if refused else str(path.with_suffix(".so"))

    def run(*, compiled_source, inputs, output_shapes, output_dtypes, scalars, **_) -> list:
        """Run the kernel on copies in memory that processes share."""
        outputs = list(map(mx.zeros, output_shapes, output_dtypes))
        mx.eval(inputs, outputs)
        views = [np.array(array, copy=False) for array in inputs + outputs]
        starts = np.cumsum([0] + [-(-view.nbytes // 64) * 64 for view in views]).tolist()
        arena = np.frombuffer(mmap.mmap(-1, starts[-1]), np.uint8)
        copies = []
        for view, start in zip(views, starts, strict=False):
            copies.append(arena[start : start + view.nbytes].view(view.dtype).reshape(view.shape))
            copies[-1][...] = view
        addresses = (ctypes.c_void_p * len(copies))(*(copy.ctypes.data for copy in copies))
        ctypes.CDLL(compiled_source).run(N_BLOCKS, addresses, *scalars)
        for view, copy in zip(views, copies, strict=True):
            if not np.array_equal(view, copy):
                view[...] = copy
        layers.append(scalars[0])
        return outputs

    monkeypatch.setattr(models, "ON_CPU", False)
    monkeypatch.setattr(models, "THREADS", THREADS)
    monkeypatch.setattr(models, "compile_cuda", compile_with_gxx)
    attributes = {16: N_BLOCKS, 97: 100_000}
    monkeypatch.setattr(models, "cuda_attribute", attributes.get)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "compile", lambda function: function)
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", run)
    return layers


ARGS = models.ModelArgs(
    dim=128,
    n_layers=2,
    head_dim=64,
    hidden_dim=192,
    n_heads=2,
    n_kv_heads=1,
    norm_eps=1e-5,
    vocab_size=50,
)


@pytest.mark.parametrize(
    ("dtype", "bits", "adapted"),
    [
        ("float32", 16, False),
        ("float32", 16, True),
        ("float32", 8, True),
        ("float16", 16, True),
        ("float16", 4, False),
        ("float16", 4, True),
    ],
)
def test_the_kernel_gives_the_logits_of_the_model(dtype, bits, adapted, emulated_cuda):
    mx.random.seed(1)
    model = models.Model(ARGS)
    model.set_dtype(getattr(mx, dtype))
    if bits < 16:
        linear = lambda name, m: isinstance(m, nn.Linear) and name != "output"  # noqa: E731
        nn.quantize(model, 32, bits, class_predicate=linear)
    if adapted:
        lora.add_lora(model, [1])
        for name in ("wq", "wv"):
            adapter = model.layers[1].attention[name]
            adapter.lora_b = mx.random.normal(adapter.lora_b.shape) * 0.3
    tokens = mx.random.randint(0, 50, (1, 257))
    expected, _ = model(tokens)
    _, cache = model(tokens[:, :255])

    decoder = models.Decoder(model, cache)
    logits = [decoder(tokens[:, i : i + 1]) for i in (255, 256)]  # the cache grows at 256
    logits.append(models.Decoder(model)(tokens[:, :1]))
    expected = expected[:, [255, 256, 0]].astype(mx.float32)
    tolerance = mx.abs(expected).max().item() * (2e-3 if dtype == "float16" else 1e-5)
    actual = mx.stack(logits, 1).astype(mx.float32)
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=0)
    assert emulated_cuda == [0, 16 if adapted else 0] * 3  # LoRA's ranks in each layer that ran


@pytest.mark.parametrize(
    "change", [{"head_dim": 32}, {"dim": 126}, {"hidden_dim": 40_000}], ids=str
)
def test_a_model_that_the_kernel_does_not_fit_is_decoded_without_it(change, emulated_cuda):
    model = models.Model(models.ModelArgs(**{**vars(ARGS), "n_layers": 1, **change}))
    token = mx.array([[7]])
    np.testing.assert_allclose(
        models.Decoder(model)(token), model(token)[0][:, -1], atol=1e-5, rtol=0
    )
    assert not emulated_cuda
