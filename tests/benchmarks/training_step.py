"""Time of a LoRA training step, ours against mlx-lm and PEFT, on random tokens.

    python tests/benchmarks/training_step.py --shape tiny
    python tests/benchmarks/training_step.py --shape 7b --dtype bfloat16 --bits 16 4
    python tests/benchmarks/training_step.py --lora-projections all --contenders ours PEFT
    python tests/benchmarks/training_step.py --shape 1b --dtype bfloat16  # a large vocabulary

Every contender runs in a process of its own, in turns, on the same shapes, batch and device: rank 8
on wq and wv, or what --lora-projections names, of the top 16 layers, Adam. Needs mlx-lm, peft and
transformers.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SHAPES = {  # dim, layers, heads, key-value heads, hidden, vocabulary, batch, length
    "tiny": (256, 8, 8, 4, 688, 4096, 4, 128),
    "small": (512, 8, 8, 4, 1408, 32000, 4, 256),
    "350m": (1024, 24, 16, 16, 2816, 32000, 4, 256),
    "7b": (4096, 32, 32, 8, 14336, 32000, 4, 512),
    "base": (576, 30, 9, 3, 1536, 49152, 4, 256),  # the base model's
    "1b": (2048, 16, 32, 8, 8192, 128256, 4, 1024),  # Llama 3.2 1B's
    "llama3-8b": (4096, 32, 32, 8, 14336, 128256, 4, 512),
    "qwen2.5-7b": (3584, 28, 28, 4, 18944, 152064, 4, 512),
}
TIED = [SHAPES["1b"]]  # the embedding is the output projection, too
BIASED = [SHAPES["qwen2.5-7b"]]  # wq, wk and wv have biases
LAYERS, RANK = 16, 8
NAMES = {  # of the projections, in other tools
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}
DEFAULT = ("wq", "wv")


def make_ours(
    shape: tuple, dtype: str, bits: int, adapters: bool = True, projections: list[str] = DEFAULT
):
    """Our model, its weights random."""
    sys.path.insert(0, str(ROOT))
    from models import Model, ModelArgs, add_lora, quantizable, top_layers
    from parts.device import limit_command_buffers

    import mlx.core as mx
    import mlx.nn as nn

    limit_command_buffers(training=adapters)
    dim, layers, heads, kv_heads, hidden, vocabulary, *_ = shape
    sizes = dim, layers, dim // heads, hidden, heads, kv_heads, 1e-5, vocabulary
    options = {"tie_word_embeddings": shape in TIED, "attention_bias": shape in BIASED}
    model = Model(ModelArgs(*sizes, **options))
    model.set_dtype(getattr(mx, dtype))
    if bits < 16:
        nn.quantize(model, 64, bits, class_predicate=quantizable)
    if adapters:
        add_lora(model, top_layers(model, LAYERS), projections, RANK)
    mx.eval(model.parameters())
    mx.clear_cache()
    mx.reset_peak_memory()  # of making random weights
    return model


def prepare_ours(
    shape: tuple, dtype: str, bits: int, projections: list[str]
) -> tuple[Callable, Callable]:
    """Gives a function that starts a step, and one that waits for all and tells the peak memory."""
    model = make_ours(shape, dtype, bits, projections=projections)
    import lora
    from parts import device

    import mlx.core as mx
    import mlx.optimizers as optim

    *_, vocabulary, batch, length = shape
    step = lora.make_step(model, optim.Adam(1e-5), lora.loss, device.open_streams(batch))
    tokens = mx.random.randint(0, vocabulary, (batch, length + 1))
    lengths = mx.full((batch,), length, mx.int32)

    def wait() -> int:
        mx.eval(model.trainable_parameters())
        return device.peak_memory()

    mx.eval(tokens, lengths)
    return lambda: step(tokens[:, :-1], tokens[:, 1:], lengths), wait


def make_mlx_lm(
    shape: tuple, dtype: str, bits: int, adapters: bool = True, projections: list[str] = DEFAULT
):
    """mlx-lm's Llama or Qwen 2, its weights random."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models import llama, qwen2
    from mlx_lm.tuner.utils import linear_to_lora_layers

    dim, layers, heads, kv_heads, hidden, vocabulary, *_ = shape
    family, name = (qwen2, "qwen2") if shape in BIASED else (llama, "llama")
    model = family.Model(
        family.ModelArgs(
            model_type=name,
            hidden_size=dim,
            num_hidden_layers=layers,
            intermediate_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=1e-5,
            vocab_size=vocabulary,
            tie_word_embeddings=shape in TIED,
        )
    )
    model.set_dtype(getattr(mx, dtype))
    if bits < 16:
        linear = lambda name, m: isinstance(m, nn.Linear) and name != "lm_head"  # noqa: E731
        nn.quantize(model, 64, bits, class_predicate=linear)
    if adapters:
        model.freeze()
        keys = {NAMES[name] for name in projections}
        config = {"rank": RANK, "scale": 2.0, "dropout": 0.0, "keys": keys}
        linear_to_lora_layers(model, LAYERS, config)
        model.train()
    mx.eval(model.parameters())
    mx.clear_cache()
    mx.reset_peak_memory()  # of making random weights
    return model


def prepare_mlx_lm(
    shape: tuple, dtype: str, bits: int, projections: list[str]
) -> tuple[Callable, Callable]:
    """mlx-lm's model and loss, in the compiled step of its trainer."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import default_loss

    model = make_mlx_lm(shape, dtype, bits, projections=projections)
    *_, vocabulary, batch, length = shape
    optimizer = optim.Adam(1e-5)
    loss_and_grad = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    def plain(tokens: mx.array, lengths: mx.array) -> tuple:
        result, gradients = loss_and_grad(model, tokens, lengths)
        optimizer.update(model, gradients)
        return result

    compiled = mx.compile(plain, inputs=state, outputs=state)
    tokens = mx.random.randint(0, vocabulary, (batch, length + 1))
    lengths = mx.array([[0, length]] * batch)

    def start() -> None:
        result = compiled(tokens, lengths)
        mx.eval(state, result)  # as its trainer does

    def wait() -> int:
        mx.eval(state)
        return mx.get_peak_memory()

    mx.eval(tokens, lengths)
    return start, wait


def make_transformers(shape: tuple, dtype: str, **options):
    """transformers' Llama, its weights random, and the device that it is on.

    options: of its configuration.
    """
    import torch
    import transformers

    dim, layers, heads, kv_heads, hidden, vocabulary, *_ = shape
    config = transformers.LlamaConfig(
        hidden_size=dim,
        num_hidden_layers=layers,
        intermediate_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5,
        vocab_size=vocabulary,
        tie_word_embeddings=shape in TIED,
        **options,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        torch.set_default_dtype(getattr(torch, dtype))
        model = transformers.LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model, device


def prepare_peft(
    shape: tuple, dtype: str, bits: int, projections: list[str], compiled: bool = False
) -> tuple[Callable, Callable]:
    """transformers' Llama with PEFT's adapters; `bits` below 16 is not compared."""
    import peft
    import torch

    _, layers, *_, vocabulary, batch, length = shape
    model, device = make_transformers(shape, dtype, use_cache=False)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=[NAMES[name].split(".")[1] for name in projections],
            layers_to_transform=list(range(max(0, layers - LAYERS), layers)),
            task_type="CAUSAL_LM",
        ),
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    tokens = torch.randint(0, vocabulary, (batch, length + 1), device=device)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens[:, :-1]).logits.float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    run = torch.compile(loss) if compiled else loss

    def start() -> None:
        run(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    def wait() -> int:
        if device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    return start, wait


def with_our_blas(prepare: Callable) -> Callable:
    """`prepare`, of mlx-lm, with the BLAS that we load."""

    def prepare_with_it(*args, **options):
        sys.path.insert(0, str(ROOT))
        from parts import device

        assert device.FAST_BLAS, "there is no other BLAS here"
        return prepare(*args, **options)

    return prepare_with_it


CONTENDERS = {
    "ours": prepare_ours,
    "mlx-lm": prepare_mlx_lm,
    "mlx-lm, our BLAS": with_our_blas(prepare_mlx_lm),
    "PEFT": prepare_peft,
    "PEFT compiled": lambda *a: prepare_peft(*a, compiled=True),
}


def measure(
    name: str, shape: str, dtype: str, bits: int, steps: int, projections: list[str]
) -> dict:
    """Seconds of the first step and of each later one on average, and peak memory in bytes."""
    start, wait = CONTENDERS[name](SHAPES[shape], dtype, bits, projections)
    begin = time.perf_counter()
    start()
    wait()
    first = time.perf_counter() - begin
    start()
    wait()
    begin = time.perf_counter()
    for _ in range(steps):
        start()
    peak = wait()
    return {"first": first, "step": (time.perf_counter() - begin) / steps, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--bits", type=int, nargs="+", default=[16], help="16: not quantized")
    parser.add_argument("--lora-projections", nargs="+", default=DEFAULT, help="or all")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    projections = list(NAMES) if args.lora_projections == ["all"] else args.lora_projections
    if args.one:
        result = measure(args.one, args.shape, args.dtype, args.bits[0], args.steps, projections)
        print(json.dumps(result))
        return

    *_, batch, length = SHAPES[args.shape]
    print(
        f"{args.shape}, {args.dtype}, batch {batch} x {length}, LoRA in {' '.join(projections)}, "
        f"medians of {args.rounds} rounds"
    )
    print("| | bits | first step, s | step, s | tokens/s | peak memory, GB | to ours |")
    print("|---|---|---|---|---|---|---|")
    for bits in args.bits:
        names = [n for n in args.contenders if bits == 16 or not n.startswith("PEFT")]
        results = {name: [] for name in names}
        for _ in range(args.rounds):
            for name in names:
                command = [sys.executable, __file__, "--one", name, "--shape", args.shape]
                command += ["--dtype", args.dtype, "--bits", str(bits), "--steps", str(args.steps)]
                command += ["--lora-projections", *projections]
                output = subprocess.run(command, capture_output=True, text=True)
                if output.returncode:
                    print(f"{name} failed: {output.stderr[-500:]}", file=sys.stderr)
                    continue
                results[name].append(json.loads(output.stdout.splitlines()[-1]))
        for name, runs in results.items():
            if not runs:
                continue
            step = statistics.median(run["step"] for run in runs)
            ours = statistics.median(run["step"] for run in results["ours"])
            print(
                f"| {name} | {bits} | {runs[0]['first']:.2f} | {step:.4f} "
                f"| {batch * length / step:,.0f} | {max(run['peak'] for run in runs) / 1e9:.2f} "
                f"| {step / ours:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
