"""The kernels of the .cu files, run on a CPU: compiled by g++ as they stand, but for a few lines of
assembly, with a block's threads in turns, and a process for each block that waits. At the end, the
tests that need a GPU; where there is one, only these run.
"""

import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
from conftest import LLAMA3_ROPE, ROOT

from parts import (
    decoder,
    decoder_batch,
    decoder_batch_cuda,
    decoder_cuda,
    device,
    joined_layers,
    training_layers,
    joined_linear,
    kv_cache,
    nvrtc,
    ops,
    ops_cuda,
    quantized_cuda,
)
from parts.adapters import PROJECTIONS, to_vector
from parts.decoder import Decoder, generate_step
from parts.decoder_batch import BatchDecoder
from parts.files import digest

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map_with_path

import lora
from models import LoRALinear, Model, ModelArgs, add_lora, quantizable

N_BLOCKS, THREADS = 5, 64
pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux"
    ),
    pytest.mark.skipif(device.TURNED, reason="Metal has none of these kernels"),
]
on_gpu = pytest.mark.skipif(not device.has_cuda(), reason="needs CUDA")

# Few headers: they take as long to read as a kernel.
BEFORE = """
#include <bit>
#include <cmath>
#include <csetjmp>
#include <sched.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#define __device__
#define __global__
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static

template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
struct Index { int x; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };

static Index threadIdx, blockIdx, gridDim, blockDim{THREADS};

// A block's threads take turns on one of the system's: each runs until it waits for others.
static ucontext_t beginnings[THREADS], end;
static jmp_buf places[THREADS];
static bool begun[THREADS], ended[THREADS];
alignas(64) static char stacks[THREADS][1 << 16];

__attribute__((noinline)) void run_next_thread() {
    int last = threadIdx.x;
    do {
        threadIdx.x = (threadIdx.x + 1) % THREADS;
    } while (ended[threadIdx.x] && threadIdx.x != last);
    if (ended[threadIdx.x]) setcontext(&end);
    if (begun[threadIdx.x]) _longjmp(places[threadIdx.x], 1);
    begun[threadIdx.x] = true;
    setcontext(&beginnings[threadIdx.x]);
}

__attribute__((noinline)) void let_others_run() {
    if (!_setjmp(places[threadIdx.x])) run_next_thread();
}

void run_threads(void (*one)()) {
    for (int i = 0; i < THREADS; i++) {
        getcontext(&beginnings[i]);
        beginnings[i].uc_stack.ss_sp = stacks[i];
        beginnings[i].uc_stack.ss_size = sizeof stacks[i];
        makecontext(&beginnings[i], one, 0);
        begun[i] = ended[i] = false;
    }
    static volatile bool started;
    started = false;
    getcontext(&end);
    if (started) return;
    started = true;
    threadIdx.x = THREADS - 1;
    run_next_thread();
}

struct Barrier {
    int n_threads, n_arrived, n_met;
    void arrive_and_wait() {
        int before = n_met;
        if (++n_arrived == n_threads) n_arrived = 0, n_met++;
        while (n_met == before) let_others_run();
    }
};
static Barrier block{THREADS}, warps[] = {{32}, {32}};
static float exchanged[THREADS];
static_assert(THREADS == 64);

void __syncthreads() { block.arrive_and_wait(); }
void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
template <class T> T atomicAdd(T* to, T n) { return __atomic_fetch_add(to, n, __ATOMIC_SEQ_CST); }
float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
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

// The tensor cores' product, of what each lane of a warp holds (PTX's manual, mma.m16n8k16).
static unsigned fragments[THREADS][6];

float half_of(unsigned word, int which, bool is_float16) {
    unsigned short bits = word >> 16 * which;
    if (is_float16) return std::bit_cast<_Float16>(bits);
    return __uint_as_float(unsigned(bits) << 16);
}

unsigned multiply_add_pairs(unsigned a, unsigned b, unsigned c, bool is_float16) {
    unsigned sums = 0;
    for (int i = 0; i < 2; i++) {
        float factor = half_of(b, i, is_float16);
        float sum = half_of(a, i, is_float16) * factor + half_of(c, i, is_float16);
        unsigned bits = std::bit_cast<unsigned>(sum) + 0x8000u >> 16;
        if (is_float16) bits = std::bit_cast<unsigned short>(_Float16(sum));
        sums |= bits << 16 * i;
    }
    return sums;
}

void multiply_fragments(float* c, const unsigned* a, unsigned b0, unsigned b1, bool is_float16) {
    auto& warp = warps[threadIdx.x / 32];
    unsigned* own = fragments[threadIdx.x];
    for (int i = 0; i < 4; i++) own[i] = a[i];
    own[4] = b0, own[5] = b1;
    warp.arrive_and_wait();
    int lane = threadIdx.x % 32, first = threadIdx.x - lane;
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            unsigned of_a = fragments[first + row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            unsigned of_b = fragments[first + column * 4 + k % 8 / 2][4 + k / 8];
            c[i] += half_of(of_a, k % 2, is_float16) * half_of(of_b, k % 2, is_float16);
        }
    }
    warp.arrive_and_wait();
}

struct Address {
    void* address;
    template <class T> operator T*() const { return static_cast<T*>(address); }
};
"""
ASSEMBLY_OF_NUMBERS = {
    r'asm\("cvt\.rn\.f16\.f32.*?\);': "bits = std::bit_cast<unsigned short>(_Float16(x));",
    r'asm\("cvt\.f32\.f16.*?\);': "x = std::bit_cast<_Float16>(bits);",
    r'asm\("cvt\.rn\.bf16\.f32.*?\);': "bits = std::bit_cast<unsigned>(x) >> 16;",
}
ASSEMBLY_OF_TENSOR_CORES = {
    r'asm\("mma\.sync[^;]*f32\.f16\.f16.*?\)\);': "multiply_fragments(c, a, b0, b1, true);",
    r'asm\("mma\.sync[^;]*f32\.bf16\.bf16.*?\)\);': "multiply_fragments(c, a, b0, b1, false);",
}
ASSEMBLY_OF_PAIRS = {
    r'asm\("fma\.rn\.f16x2.*?\)\);': "sum = multiply_add_pairs(a, b, c, true);",
    r'asm\("fma\.rn\.bf16x2.*?\)\);': "sum = multiply_add_pairs(a, b, c, false);",
}
ASSEMBLY_OF_THE_DECODER = {
    r'asm volatile\("ld\.acquire.*?\);': (
        "now = __atomic_load_n(counter, __ATOMIC_SEQ_CST), sched_yield(), let_others_run();"
    ),
    r"extern __shared__ Vector shared\[\];": "static Vector shared[65536 / sizeof(Vector)];",
}
BEHIND = """
static void** at_KERNEL;
static int* scalars_KERNEL;

static void thread_of_KERNEL() {
    auto at = at_KERNEL;
    auto scalars = scalars_KERNEL;
    KERNEL(ARGUMENTS);
    ended[threadIdx.x] = true;
    run_next_thread();
}

extern "C" void run_KERNEL(int n_blocks, void** at, int* scalars) {
    at_KERNEL = at;
    scalars_KERNEL = scalars;
    gridDim.x = n_blocks;
    for (int i = 0; i < n_blocks; i++) {
        if (WAITING && fork()) continue;
        blockIdx.x = i;
        run_threads(thread_of_KERNEL);
        if (WAITING) _exit(0);
    }
    if (WAITING) for (int i = 0; i < n_blocks; i++) wait(nullptr);
}
"""


@pytest.fixture(scope="session")
def compiled_kernels(tmp_path_factory) -> Path:
    """What g++ has made of a source stays for all tests."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def emulated_cuda(monkeypatch, compiled_kernels) -> list[str]:
    """Have the parts take this machine for one with CUDA; returns the kernels that ran."""
    if device.has_cuda():
        pytest.skip("the arrays of a GPU are not the processor's to write")
    names = []

    @lru_cache
    def compile_with_gxx(source: str, constants: tuple[tuple[str, object], ...]) -> str | None:
        waiting = "decoder_layer" in source
        assembly = dict(ASSEMBLY_OF_NUMBERS)
        if "tensor_cores.cuh" in source:
            assembly |= ASSEMBLY_OF_TENSOR_CORES
            assembly |= ASSEMBLY_OF_THE_DECODER if waiting else ASSEMBLY_OF_PAIRS
        for pattern, replacement in assembly.items():
            source, n = re.subn(pattern, replacement, source, flags=re.DOTALL)
            assert n == 1, pattern
        path = compiled_kernels / f"{digest(repr((source, constants)).encode())}.cpp"
        if path.with_suffix(".so").exists():
            return str(path.with_suffix(".so"))
        behind = ""
        for name, parameters in re.findall(r"__global__ .*?void (\w+)\((.*?)\)", source, re.DOTALL):
            n_arrays, n = parameters.count("*"), parameters.count(",") + 1
            arguments = [f"Address{{at[{i}]}}" for i in range(n_arrays)]
            arguments += [f"scalars[{i}]" for i in range(n - n_arrays)]
            runner = BEHIND.replace("KERNEL", name).replace("WAITING", str(int(waiting)))
            behind += runner.replace("ARGUMENTS", ", ".join(arguments))
        path.write_text(BEFORE + source + behind)
        options = [
            "-std=c++20",
            "-O1",
            "-w",
            "-U_FORTIFY_SOURCE",
            "-shared",
            "-fPIC",
            f"-DTHREADS={THREADS}",
        ]
        options += [f"-D{name}={value}" for name, value in constants]
        command = ["g++", *options, str(path), "-o", str(path.with_suffix(".so"))]
        refused = subprocess.run(command, capture_output=True).returncode
        return None if refused else str(path.with_suffix(".so"))

    def run(
        *, name, compiled_source, inputs, output_shapes, output_dtypes, scalars, grid, **_
    ) -> list:
        """Run the kernel on copies in memory that processes share."""
        outputs = list(map(mx.zeros, output_shapes, output_dtypes))
        mx.eval(inputs, outputs)
        raw = {mx.bfloat16: mx.uint16}  # NumPy has no bfloat16
        arrays = [array.view(raw.get(array.dtype, array.dtype)) for array in inputs + outputs]
        views = [np.array(array, copy=False) for array in arrays]
        starts = np.cumsum([0] + [-(-view.nbytes // 64) * 64 for view in views]).tolist()
        arena = np.frombuffer(mmap.mmap(-1, starts[-1]), np.uint8)
        copies = []
        for view, start in zip(views, starts, strict=False):
            copies.append(arena[start : start + view.nbytes].view(view.dtype).reshape(view.shape))
            copies[-1][...] = view
        addresses = (ctypes.c_void_p * len(copies))(*(copy.ctypes.data for copy in copies))
        runner = getattr(ctypes.CDLL(compiled_source), f"run_{name}")
        runner(-(-grid[0] // THREADS), addresses, (ctypes.c_int * len(scalars))(*scalars))
        for view, copy in zip(views, copies, strict=True):
            if not np.array_equal(view, copy):
                view[...] = copy
        names.append(name)
        return outputs

    monkeypatch.setattr(device, "ON_CPU", False)
    monkeypatch.setattr(decoder_cuda, "THREADS", THREADS)
    monkeypatch.setattr(quantized_cuda, "THREADS", THREADS)
    monkeypatch.setattr(decoder_batch_cuda, "THREADS", THREADS)
    monkeypatch.setattr(nvrtc, "compile_kernels", compile_with_gxx)
    attributes = {nvrtc.MULTIPROCESSORS: N_BLOCKS, nvrtc.MAX_SHARED_MEMORY: 100_000}
    monkeypatch.setattr(nvrtc, "attribute", attributes.get)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "compile", lambda function, **_: function)
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", run)
    return names


@pytest.mark.parametrize(
    "name",
    [
        "numbers.cuh",
        "ops_cuda.cu",
        "tensor_cores.cuh",
        "decoder_products.cuh",
        "decoder_cuda.cu",
        "decoder_batch_cuda.cu",
        "quantized_cuda.cu",
    ],
)
def test_an_error_of_the_compiler_names_the_file_of_the_kernel_and_the_line(name):
    lines = (ROOT / "parts" / name).read_text("utf-8").splitlines(keepends=True)
    broken = [*lines[:9], "#error broken\n", *lines[10:]]
    source = nvrtc.read_source("ops_cuda.cu" if name == "numbers.cuh" else name)
    source = source.replace("".join(lines), "".join(broken))
    command = ["g++", "-E", "-x", "c++", "-"]
    process = subprocess.run(command, input=source, capture_output=True, text=True)
    assert f"parts/{name}:10:" in process.stderr


ARGS = ModelArgs(
    dim=128,
    n_layers=2,
    head_dim=64,
    hidden_dim=192,
    n_heads=2,
    n_kv_heads=1,
    norm_eps=1e-5,
    vocab_size=50,
)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "llama": {},
    "llama3": {"rope_scaling": LLAMA3_ROPE, "rope_theta": 5e5},
    "llama3.2": {"rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 128},
    "mistral": {"sliding_window": 100},
    "qwen2": {"attention_bias": True, "sliding_window": 20, "n_heads": 3, "n_kv_heads": 3},
    "qwen3": {"qk_norm": True, "rope_scaling": YARN, "dim": 96},
}


def random_model(args: ModelArgs, dtype: str, bits: int, adapted: bool) -> Model:
    """With biases and norms that are not those of a new model, and LoRA in all of the last layer's
    projections, each with a rank and a scale of its own.
    """
    mx.random.seed(1)
    model = Model(args).eval()
    for layer in model.layers:
        attention = layer.attention
        for norm in (n for n in ("q_norm", "k_norm") if n in attention):
            attention[norm].weight = mx.random.uniform(0.5, 1.5, attention[norm].weight.shape)
        for linear in (attention.wq, attention.wk, attention.wv):
            if "bias" in linear:
                linear.bias = mx.random.normal(linear.bias.shape)
    model.set_dtype(getattr(mx, dtype))
    if bits < 16:
        nn.quantize(model, 32, bits, class_predicate=quantizable)
    last = model.layers[-1]
    for i, name in enumerate(("wq", "wk", "wv", "wo", "w1", "w2", "w3") if adapted else ()):
        block = last.attention if name in last.attention else last.feed_forward
        block[name] = LoRALinear.from_linear(block[name], rank=3 + i)
        block[name].scale = 1 + i / 4
        block[name].lora_b = mx.random.normal(block[name].lora_b.shape) * 0.3
    mx.eval(model.parameters())
    return model


def decoded(model: Model, tokens: mx.array, n_cached: int) -> mx.array:
    """The logits after each of the tokens from `n_cached` on, then those after the first alone."""
    _, cache = model(tokens[:, :n_cached])
    decode = Decoder(model, cache)
    logits = [decode(tokens[:, i : i + 1]) for i in range(n_cached, tokens.shape[1])]
    mx.eval(logits)
    logits.append(Decoder(model)(tokens[:, :1]))
    return mx.stack(logits, 1).astype(mx.float32)


@pytest.mark.parametrize(
    ("family", "dtype", "bits", "adapted"),
    [
        ("llama", "float32", 16, False),
        ("llama", "float16", 16, True),
        ("llama", "float16", 4, False),
        ("llama3", "float32", 8, True),
        ("llama3.2", "float16", 4, True),
        ("mistral", "float32", 16, True),
        ("qwen2", "bfloat16", 4, True),
        ("qwen2", "float32", 4, False),
        ("qwen3", "float32", 16, True),
    ],
)
def test_the_kernel_gives_the_logits_of_the_model(
    family, dtype, bits, adapted, emulated_cuda, monkeypatch
):
    model = random_model(ModelArgs(**{**vars(ARGS), **FAMILIES[family]}), dtype, bits, adapted)
    monkeypatch.setattr(kv_cache, "STEP", 256)
    monkeypatch.setattr(quantized_cuda, "has_kernels", lambda *_: False)  # here MLX's are faster
    tokens = mx.random.randint(0, 50, (1, 257))

    actual = decoded(model, tokens, 255)  # the cache grows at 256
    model.set_dtype(mx.float32)
    expected = model(tokens)[0][:, [255, 256, 0]]
    tolerance = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 3e-2}[dtype]
    tolerance *= mx.abs(expected).max().item()
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=0)
    assert emulated_cuda == ["decoder_layer"] * 3 * ARGS.n_layers


@pytest.mark.parametrize(
    ("family", "dtype", "bits", "adapted"),
    [("llama", "float16", 16, True), ("mistral", "float32", 4, False), ("qwen3", "float32", 16, 1)],
)
def test_the_kernel_of_many_rows_gives_the_logits_of_the_model(
    family, dtype, bits, adapted, emulated_cuda, monkeypatch
):
    options = {**FAMILIES[family], "n_heads": 4, "n_kv_heads": 2}
    options["sliding_window"] = 7 if family == "mistral" else None
    model = random_model(ModelArgs(**{**vars(ARGS), **options}), dtype, bits, adapted)
    monkeypatch.setattr(decoder_batch, "ROOM", 4)  # columns move twice
    texts = mx.random.randint(0, 50, (4, 19)).tolist()
    decoder = BatchDecoder(model, 3, 9)
    actual = list(decoder.prefill([0, 1, 2], [texts[0][:9], texts[1][:1], texts[2][:4]]))
    expected = [(0, 9), (1, 1), (2, 4)]
    lengths, in_slots = [9, 1, 4, 8], [0, 1, 2]
    for step in range(9):
        if step == 5:  # another text in place of the second
            decoder.release(1)
            in_slots[1] = 3
            actual += list(decoder.prefill([1], [texts[3][:8]]))
            expected.append((3, 8))
        actual += list(decoder(mx.array([texts[i][lengths[i]] for i in in_slots])))
        for i in in_slots:
            lengths[i] += 1
            expected.append((i, lengths[i]))
    mx.eval(actual)
    assert emulated_cuda == ["rows_attention"] * 9 * ARGS.n_layers
    model.set_dtype(mx.float32)
    logits = model(mx.array(texts))[0]
    expected = mx.stack([logits[i, n - 1] for i, n in expected])
    tolerance = {"float32": 1e-5, "float16": 5e-3}[dtype] * mx.abs(expected).max().item()
    actual = mx.stack(actual).astype(mx.float32)
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=0)


def test_generating_takes_none_of_the_kernels_of_training(emulated_cuda):
    """Such a process has none of them compiled, and nothing before the first token."""
    model = Model(ModelArgs(**{**vars(ARGS), "n_layers": 1}))
    ids = generate_step(model, [1, 2, 3])
    next(ids)
    assert not emulated_cuda
    next(ids)
    assert set(emulated_cuda) == {"decoder_layer"}


def test_the_kernel_is_made_ready_again_only_for_another_adapter(emulated_cuda):
    model = random_model(ARGS, "float32", 16, adapted=True)
    run = decoder_cuda.kernel_layers(model)
    assert decoder_cuda.kernel_layers(model) is run
    adapter = model.layers[-1].attention.wo
    adapter.scale *= 2
    assert decoder_cuda.kernel_layers(model) is not run
    token = mx.array([[7]])
    np.testing.assert_allclose(Decoder(model)(token), model(token)[0][:, -1], atol=1e-4, rtol=0)
    adapter.lora_b = mx.zeros_like(adapter.lora_b)
    np.testing.assert_allclose(Decoder(model)(token), model(token)[0][:, -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "change", [{"head_dim": 32}, {"dim": 126}, {"hidden_dim": 40_000}], ids=str
)
def test_a_model_that_the_kernel_does_not_fit_is_decoded_without_it(change, emulated_cuda):
    model = Model(ModelArgs(**{**vars(ARGS), "n_layers": 1, **change}))
    token = mx.array([[7]])
    np.testing.assert_allclose(Decoder(model)(token), model(token)[0][:, -1], atol=1e-5, rtol=0)
    assert "decoder_layer" not in emulated_cuda


def test_weights_of_4_bits_are_dequantized_and_multiplied_by_few_vectors_in_kernels(
    emulated_cuda, monkeypatch
):
    monkeypatch.setattr(quantized_cuda, "MOST_TILES", 1)
    check_products_of_4_bits("float16", 32, 11, (64, 384))
    assert emulated_cuda == ["dequantize", "quantized_product"]


def check_products_of_4_bits(
    dtype: str, group_size: int, n_vectors: int, shape: tuple[int, int]
) -> None:
    """With weights of this shape, against MLX's own operations in float32."""
    mx.random.seed(2)
    weights = mx.quantize(mx.random.normal(shape).astype(getattr(mx, dtype)), group_size, 4)
    dequantized = quantized_cuda.dequantize(*weights, group_size, 4).astype(mx.float32)
    floats = [a if a.dtype == mx.uint32 else a.astype(mx.float32) for a in weights]
    step = {"float16": 2**-10, "bfloat16": 2**-7}[dtype]
    expected = mx.dequantize(*floats, group_size, 4)
    np.testing.assert_allclose(dequantized, expected, atol=step, rtol=step)
    x = mx.random.normal((1, n_vectors, shape[1])).astype(getattr(mx, dtype))
    product = ops.quantized_matmul(x, *weights, group_size, 4, training=False)
    assert (product.shape, product.dtype) == ((1, n_vectors, shape[0]), x.dtype)
    expected = x.astype(mx.float32) @ expected.T
    limit = step * mx.abs(expected).max().item()
    np.testing.assert_allclose(product.astype(mx.float32), expected, atol=limit, rtol=0)


def packed_inputs(inputs: mx.array, positions: mx.array | None) -> mx.array:
    """Token ids, with their positions where rows are packed."""
    return inputs if positions is None else mx.stack([inputs, positions], -1)


def gradients_of(
    model: Model, tokens: mx.array, lengths: mx.array, positions: mx.array | None = None
) -> mx.array:
    """The gradients of the model's loss, as one vector. positions: where rows are packed."""
    inputs = packed_inputs(tokens[:, :-1], positions)
    _, tree = nn.value_and_grad(model, lora.loss)(model, inputs, tokens[:, 1:], lengths)
    return to_vector(tree)


def trained(model: Model, batch: tuple[mx.array, ...]) -> mx.array:
    """The model's LoRA matrices after two steps, as one vector; the model stays as it is."""
    before = model.trainable_parameters()
    with device.limits_restored():
        step = lora.make_step(model, optim.SGD(0.1), lora.loss, device.open_streams(1))
        assert [step(*batch).finite.item() for _ in range(2)] == [True, True]
    after = to_vector(model.trainable_parameters())
    model.update(before)
    return after


@pytest.mark.parametrize(
    ("checkpoint", "family", "packed"),
    [(False, "llama", False), (True, "qwen3", False), (True, "mistral", True)],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("float16", 3e-3), ("bfloat16", 3e-2)]
)
def test_a_training_step_has_the_gradients_of_the_plain_network(
    dtype, tolerance, checkpoint, family, packed, emulated_cuda, monkeypatch
):
    mx.random.seed(1)
    model = Model(ModelArgs(**{**vars(ARGS), **FAMILIES[family]}))
    add_lora(model, [0, 1])
    randomly = lambda path, value: mx.random.normal(value.shape) * 0.3  # noqa: E731
    model.update(tree_map_with_path(randomly, model.trainable_parameters()))
    tokens, lengths = mx.random.randint(0, 50, (3, 11)), mx.array([10, 7, 9])
    norm = model.layers[1].ffn_norm
    norm.weight = mx.random.uniform(0.5, 1.5, norm.weight.shape)
    positions = mx.array([[*range(4), *range(6)], [*range(10)], [*range(1), *range(9)]])
    gradients = partial(gradients_of, model, tokens, lengths, positions if packed else None)
    with monkeypatch.context() as plain:
        plain.setattr(ops_cuda, "has_kernels", lambda x: False)
        expected = gradients()
    assert not emulated_cuda
    adapters = model.trainable_parameters()
    model.set_dtype(getattr(mx, dtype))
    model.update(adapters)  # they stay float32
    model.grad_checkpoint = checkpoint
    np.testing.assert_allclose(
        gradients(), expected, atol=tolerance * mx.abs(expected).max().item(), rtol=0
    )
    assert set(emulated_cuda) == {"swiglu_gradients", "rms_norm_gradient", "rope"}


@pytest.mark.parametrize("n", [1, 32, 33])
def test_any_number_of_arrays_is_concatenated(n, emulated_cuda):
    arrays = [mx.random.normal((i % 3 + 1, 8)) for i in range(n)]
    expected = np.concatenate([np.array(array).ravel() for array in arrays])
    np.testing.assert_array_equal(ops_cuda.concatenate(arrays), expected)


@pytest.mark.parametrize(
    ("family", "projections", "bits", "min_size", "checkpoint"),
    [
        ("llama3", ["wq", "wv"], 16, 0, False),
        ("qwen2", list(PROJECTIONS), 16, 2**20, False),
        ("mistral", ["w1", "w2", "w3"], 4, 2**20, True),  # and packed
        ("qwen3", ["wk", "wo"], 16, 2**20, True),
        ("qwen3", ["wq", "w1", "w2"], 16, 0, False),
    ],
)
def test_joined_layers_have_the_gradients_of_the_plain_network(
    family, projections, bits, min_size, checkpoint, emulated_cuda, monkeypatch
):
    model = random_model(ModelArgs(**{**vars(ARGS), **FAMILIES[family]}), "float32", bits, False)
    add_lora(model.train(), [1], projections, 3, 1.5)
    randomly = lambda path, value: mx.random.normal(value.shape) * 0.3  # noqa: E731
    model.update(tree_map_with_path(randomly, model.trainable_parameters()))
    tokens, lengths = mx.random.randint(0, 50, (2, 6)), mx.array([5, 3])
    positions = mx.array([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]) if family == "mistral" else None
    batch = packed_inputs(tokens[:, :-1], positions), tokens[:, 1:], lengths

    expected = gradients_of(model, tokens, lengths, positions)
    with monkeypatch.context() as plain:
        plain.setattr(joined_layers, "fits", lambda model: False)
        after = trained(model, batch) if family == "llama3" else None
    emulated_cuda.clear()
    monkeypatch.setattr(joined_linear, "MIN_SIZE_OF_WORK", min_size)
    model.grad_checkpoint = checkpoint
    layers = training_layers.layers_in_training(model, lora.loss)
    vector = to_vector(model.trainable_parameters())
    prepared = layers.prepare(*batch) if family == "qwen3" else batch
    assert prepared[0].shape == (
        2,
        32 if family == "qwen3" and min_size else 5,
        *batch[0].shape[2:],
    )
    (value, _), actual = layers.value_and_grad(vector, *prepared)
    assert value.item() == pytest.approx(lora.loss(model, *batch)[0].item(), rel=1e-5)
    limit = 1e-5 * mx.abs(expected).max().item()
    np.testing.assert_allclose(actual, expected, atol=limit, rtol=0)
    assert set(emulated_cuda) >= {"joined_swiglu", "joined_swiglu_gradient", "split_heads"}
    if after is not None:
        np.testing.assert_allclose(trained(model, batch), after, atol=1e-5, rtol=0)


# dim, hidden_dim, n_heads, n_kv_heads, head_dim
LARGE = {
    "Llama 3 8B": (4096, 14336, 32, 8, 128),
    "Llama 3.2 1B": (2048, 8192, 32, 8, 64),
    "Mistral Nemo": (5120, 14336, 32, 8, 128),
    "Qwen 2.5 7B": (3584, 18944, 28, 4, 128),
    "Qwen 3 8B": (4096, 12288, 32, 8, 128),
    "Qwen 3 0.6B": (1024, 3072, 16, 8, 128),
    "SmolLM2 135M": (576, 1536, 9, 3, 64),
}
CHANGES = {
    "Llama 3 8B": FAMILIES["llama3"],
    "Llama 3.2 1B": {**FAMILIES["llama3"], "tie_word_embeddings": True},
    "Mistral Nemo": {"sliding_window": 100},
    "Qwen 2.5 7B": {"attention_bias": True},
    "Qwen 3 8B": {"qk_norm": True, "rope_scaling": YARN},
    "Qwen 3 0.6B": {"qk_norm": True, "tie_word_embeddings": True},
    "SmolLM2 135M": {"tie_word_embeddings": True},
}


CASES = [(name, "float16", bits, bits < 16) for name in LARGE for bits in (16, 4)]
CASES += [
    (name, dtype, bits, True)
    for name in ("Llama 3.2 1B", "Qwen 3 0.6B")
    for dtype, bits in [("bfloat16", 4), ("bfloat16", 16), ("float32", 16), ("float16", 8)]
]
CASES += [("Qwen 2.5 7B", dtype, 4, False) for dtype in ("float32", "float16", "bfloat16")]
# Without this variable MLX multiplies float32 in TensorFloat-32, which has 10 bits.
ERROR = {"float32": 2e-4, "float16": 5e-3, "bfloat16": 4e-2}
if os.environ.get("MLX_ENABLE_TF32") != "0":
    ERROR["float32"] = 5e-3


@on_gpu
@pytest.mark.parametrize(("name", "dtype", "bits", "adapted"), CASES)
def test_on_a_gpu_the_kernel_gives_the_logits_of_the_model(name, dtype, bits, adapted):
    """The cache grows at 512."""
    names = "dim", "hidden_dim", "n_heads", "n_kv_heads", "head_dim"
    shape = dict(zip(names, LARGE[name], strict=True))
    args = ModelArgs(**{**vars(ARGS), **shape, **CHANGES[name], "n_layers": 2})
    model = random_model(args, dtype, bits, adapted)
    assert decoder_cuda.kernel_layers(model)
    tokens = mx.random.randint(0, 50, (1, 514))
    actual = decoded(model, tokens, 509)
    model.set_dtype(mx.float32)
    expected = model(tokens)[0][:, [*range(509, 514), 0]]
    error = (mx.abs(actual - expected).max() / mx.abs(expected).max()).item()
    assert error < ERROR[dtype]


@on_gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("group_size", "n_vectors", "shape"),
    [(64, 1, (4096, 4096)), (64, 64, (14336, 4096)), (32, 17, (96, 192)), (128, 128, (1024, 8192))],
)
def test_on_a_gpu_weights_of_4_bits_are_those_of_mlx(dtype, group_size, n_vectors, shape):
    check_products_of_4_bits(dtype, group_size, n_vectors, shape)


@on_gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "bits"), [("float32", 16), ("float16", 4)])
def test_on_a_gpu_kernel_separate_layers_and_cpu_agree(family, dtype, bits, monkeypatch):
    model = random_model(ModelArgs(**{**vars(ARGS), **FAMILIES[family]}), dtype, bits, True)
    tokens = mx.random.randint(0, 50, (1, 514))
    actual = decoded(model, tokens, 509)
    with monkeypatch.context() as separate:
        separate.setattr(decoder, "kernel_layers", lambda model: None)
        others = decoded(model, tokens, 509)
    model.set_dtype(mx.float32)
    with mx.stream(mx.cpu):
        expected = model(tokens)[0][:, [*range(509, 514), 0]]
        mx.eval(expected)
    limit = ERROR[dtype] * mx.abs(expected).max().item()
    np.testing.assert_allclose(actual, expected, atol=limit, rtol=0)
    np.testing.assert_allclose(others, expected, atol=limit, rtol=0)


@on_gpu
def test_on_a_gpu_a_window_longer_than_the_text_changes_nothing():
    args = {**vars(ARGS), "dim": 256, "n_layers": 2}
    tokens, logits = mx.random.randint(0, 50, (1, 600)), []
    for window in (None, 4096):
        model = random_model(ModelArgs(**{**args, "sliding_window": window}), "float16", 4, True)
        logits.append(decoded(model, tokens, 500))
    np.testing.assert_array_equal(*logits)


@on_gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 5e-2)])
def test_on_a_gpu_a_training_step_has_the_gradients_of_the_plain_network(
    family, dtype, tolerance, monkeypatch
):
    model = random_model(
        ModelArgs(**{**vars(ARGS), **FAMILIES[family]}), "float32", 16, True
    ).train()
    model.freeze()
    for layer in model.layers:
        layer.unfreeze(keys=["lora_a", "lora_b"], strict=False)
    tokens, lengths = mx.random.randint(0, 50, (3, 121)), mx.array([120, 77, 99])

    gradients = partial(gradients_of, model, tokens, lengths)
    with monkeypatch.context() as plain:
        plain.setattr(ops_cuda, "has_kernels", lambda x: False)
        expected = gradients()
    adapters = model.trainable_parameters()
    model.set_dtype(getattr(mx, dtype))
    model.update(adapters)
    limit = tolerance * mx.abs(expected).max().item()
    np.testing.assert_allclose(gradients(), expected, atol=limit, rtol=0)
    vector, batch = to_vector(adapters), (tokens[:, :-1], tokens[:, 1:], lengths)
    with monkeypatch.context() as plain:
        plain.setattr(joined_layers, "fits", lambda model: False)
        after = trained(model, batch)
    change = mx.abs(after - vector).max().item()
    for min_size in 0, 2**20:
        monkeypatch.setattr(joined_linear, "MIN_SIZE_OF_WORK", min_size)
        layers = training_layers.layers_in_training(model, lora.loss)
        assert isinstance(layers, joined_layers.JoinedLayers)
        actual = mx.compile(layers.value_and_grad)(vector, *batch)[1]
        np.testing.assert_allclose(actual, expected, atol=limit, rtol=0)
        actual = trained(model, batch)
        np.testing.assert_allclose(actual, after, atol=tolerance * change, rtol=0)
