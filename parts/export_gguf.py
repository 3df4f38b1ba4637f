"""A model out as one GGUF file, for llama.cpp, Ollama and LM Studio, by llama.cpp's own package.

llama.cpp's "llama" network takes the rows of wq and wk as ours are; "qwen2" and "qwen3" take them
in half-split order. Norms and biases are float32 there, and a tied output is left out.
"""

import io
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from parts.fusing import Weight, cast, half_split, not_finite, rotated
from parts.gguf_vocabulary import read_gguf_vocabulary
from parts.hugging_face import rename
from parts.module_names import TO_GGUF
from parts.rope import ORIGINAL_CONTEXT, Rope, amplitude, frequencies

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
MADE_BY = "Written by fuse.py"  # in the head of a file, by which one of ours is known
Q8_GROUP = 32  # weights that share a scale in Q8_0


def import_gguf():
    """Return the package. Raises ValueError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError("--format gguf needs the package gguf: pip install gguf") from error
    return gguf


def check_replaceable(path: Path) -> None:
    """Raise ValueError, FileNotFoundError or IsADirectoryError where a file cannot be written
    there, or should not: what fuse.py did not make, it does not replace.
    """
    if path.is_dir():
        raise IsADirectoryError(
            f"--save-path {path} is a folder: name a file, as {path}/model.gguf"
        )
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"the folder of --save-path {path} does not exist: make it")
    if path.exists() and not is_ours(path):
        raise ValueError(f"--save-path {path} is a file that fuse.py did not make: name another")


def is_ours(path: Path) -> bool:
    """Whether fuse.py has made this file."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(2**12)
    return head[:4] == b"GGUF" and MADE_BY.encode() in head


# -------------------------------------------------------------------------------------------------
# Weights


def to_gguf(weights: Iterable[Weight], params: dict, rope: Rope, dtype: str) -> list[Weight]:
    """Return the weights under GGUF's names, in its order of rows and its types.

    params: the values of `ModelArgs`; rope: of the model; dtype: float16, bfloat16, float32 or
    q8_0.
    """
    out = []
    halves = ARCHITECTURES[params["model_type"]] != "llama"
    for weight in weights:
        if halves and rotated(weight.name):
            weight = half_split(weight, params["head_dim"])
        name = rename(weight.name, TO_GGUF)
        if len(weight.shape) == 1:
            weight = cast(weight, "float32")
        elif dtype == "q8_0" and weight.shape[1] % Q8_GROUP == 0:
            weight = to_q8(weight)
        else:
            weight = cast(weight, "float16" if dtype == "q8_0" else dtype)
        out.append(weight._replace(name=name))
    if dict(rope.scaling).get("rope_type") == "llama3":
        slowed = (Rope(rope.head_dim, rope.theta), rope)
        factors = np.divide(*map(frequencies, slowed)).astype(np.float32)
        out.append(Weight("rope_freqs.weight", factors.shape, "float32", lambda: iter([factors])))
    return out


def to_q8(weight: Weight) -> Weight:
    """Return a weight in 8 bits: of each group of 32, a scale in float16 and the integers.

    The blocks raise ValueError where a scale is not finite.
    """
    gguf = import_gguf()
    kind = gguf.GGMLQuantizationType.Q8_0

    def blocks() -> Iterator[np.ndarray]:
        for block in weight.blocks():
            with np.errstate(all="ignore"):
                groups = gguf.quants.quantize(block.astype(np.float32), kind)
            scales = groups.reshape(-1, 2 + Q8_GROUP)[:, :2].copy().view(np.float16)
            if not np.isfinite(scales).all():
                raise ValueError(not_finite(weight.name, "q8_0"))
            yield groups

    shape = gguf.quants.quant_shape_to_byte_shape(weight.shape, kind)
    return weight._replace(shape=shape, dtype="uint8", blocks=blocks)


def write_gguf(file: BinaryIO, head: bytes, weights: list[Weight]) -> Iterator[int]:
    """Write the head, of `make_head`, and the weights, block by block; yield the bytes of each."""
    file.write(head)
    for weight in weights:
        for block in weight.blocks():
            file.write(block.data)
            yield block.nbytes
        file.write(bytes(-weight.nbytes % import_gguf().GGUF_DEFAULT_ALIGNMENT))


# -------------------------------------------------------------------------------------------------
# What describes the model


def make_head(
    folder: Path,
    params: dict,
    rope: Rope,
    weights: list[Weight],
    dtype: str,
    bos_id: int | None,
    eos_ids: list[int],
    context: int,
    template: bytes | None,
) -> bytes:
    """Return all of a GGUF file that comes before the weights.

    folder: of convert.py; params: the values of `ModelArgs`; weights: of `to_gguf`; bos_id: None
    where no token begins a text; context: positions; template: of chats.
    """
    gguf = import_gguf()
    stored = {
        "float16": gguf.GGMLQuantizationType.F16,
        "bfloat16": gguf.GGMLQuantizationType.BF16,
        "float32": gguf.GGMLQuantizationType.F32,
        "uint8": gguf.GGMLQuantizationType.Q8_0,
    }
    files = {"float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "float32": "ALL_F32"}
    files["q8_0"] = "MOSTLY_Q8_0"
    writer = gguf.GGUFWriter(None, ARCHITECTURES[params["model_type"]])
    writer.add_description(MADE_BY)
    writer.add_name(folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[files[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, params, context)
    add_scaling(writer, rope)
    add_vocabulary(writer, folder, params["vocab_size"], bos_id, eos_ids)
    if template is not None:
        writer.add_chat_template(without_marks(template.decode()))
    for weight in weights:
        kind = np.uint8 if weight.dtype == "uint8" else np.float16
        writer.add_tensor_info(
            weight.name, weight.shape, np.dtype(kind), weight.nbytes, stored[weight.dtype]
        )
    head = io.BytesIO()
    writer.fout, writer.state = [head], gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return head.getvalue() + bytes(-head.tell() % writer.data_alignment)


def add_shape(writer, params: dict, context: int) -> None:
    """Write the shape of the network."""
    writer.add_context_length(context)
    writer.add_embedding_length(params["dim"])
    writer.add_block_count(params["n_layers"])
    writer.add_feed_forward_length(params["hidden_dim"])
    writer.add_head_count(params["n_heads"])
    writer.add_head_count_kv(params["n_kv_heads"])
    writer.add_key_length(params["head_dim"])
    writer.add_value_length(params["head_dim"])
    writer.add_layer_norm_rms_eps(params["norm_eps"])
    writer.add_rope_dimension_count(params["head_dim"])
    writer.add_rope_freq_base(params["rope_theta"])
    writer.add_vocab_size(params["vocab_size"])


def add_scaling(writer, rope: Rope) -> None:
    """Write how positions are scaled; for "llama3" it is a tensor (`to_gguf`)."""
    kinds = import_gguf().RopeScalingType
    scaling = dict(rope.scaling)
    kind = scaling.get("rope_type")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(kinds.LINEAR if kind == "linear" else kinds.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(scaling[ORIGINAL_CONTEXT]))
        writer.add_rope_scaling_yarn_beta_fast(scaling.get("beta_fast", 32.0))
        writer.add_rope_scaling_yarn_beta_slow(scaling.get("beta_slow", 1.0))
        usual = 1 + 0.1 * math.log(max(scaling["factor"], 1))  # llama.cpp's own amplitude
        writer.add_rope_scaling_attn_factors(amplitude(rope) / usual)


def add_vocabulary(
    writer, folder: Path, vocab_size: int, bos_id: int | None, eos_ids: list[int]
) -> None:
    """Write the tokenizer, and which tokens begin and end a text."""
    vocabulary = read_gguf_vocabulary(folder, vocab_size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
        writer.add_remove_extra_whitespaces(vocabulary.extra_spaces)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.unknown is not None:
        writer.add_unk_token_id(vocabulary.unknown)
    if bos_id is not None:
        writer.add_bos_token_id(bos_id)
    writer.add_eos_token_id(eos_ids[0])
    if len(eos_ids) > 1:
        writer.add_eot_token_id(eos_ids[1])
    writer.add_add_bos_token(bos_id is not None)
    writer.add_add_eos_token(False)


def without_marks(template: str) -> str:
    """Return a chat template without the marks of what the assistant answers, which plain Jinja
    does not know: with blocks in their place that change nothing.
    """
    begun = re.sub(r"({%[-+]?\s*)generation(\s*[-+]?%})", r"\1if true\2", template)
    return re.sub(r"({%[-+]?\s*)endgeneration(\s*[-+]?%})", r"\1endif\2", begun)


def size_of(head: bytes, weights: list[Weight]) -> int:
    """Return the size of the file in bytes."""
    alignment = import_gguf().GGUF_DEFAULT_ALIGNMENT
    return len(head) + sum(weight.nbytes + -weight.nbytes % alignment for weight in weights)
