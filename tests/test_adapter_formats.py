"""Adapters of PEFT and mlx-lm, in and out, against these libraries themselves."""

import json
import shutil
import warnings
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import mlx_lm
import mlx_lm.lora
import mlx_lm.tuner.utils
import numpy as np
import peft
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from conftest import call_script
from mlx_lm.generate import generate_step as mlx_generate_step
from test_fuse import PROMPT, contents, error_of, greedy, load, round_to, succeed, write_case

import lora
from models import add_lora
from parts import adapter_formats, adapters
from parts.adapter_formats import MODULES

import mlx.core as mx

FAMILIES = {"grouped": "TinyLlama", "biases": "Qwen 2.5 0.5B", "scaled": "Llama 3.1 8B"}
ALL_OF_THEIRS = [name.rpartition(".")[2] for name in MODULES]
PEFT_KEY = "base_model.model.model.layers.{}.{}.weight"


class Case(NamedTuple):
    """A model folder and an adapter file for it; the model as transformers and mlx-lm read it; the
    ids of a prompt.
    """

    folder: Path
    adapter: Path
    base: Path
    ids: list[int]


def make_case(folder: Path, family: str, texts: list[str]) -> Case:
    model, adapter = write_case(folder / "model", family, texts)
    succeed(call_script("fuse.py", "--model", model, "--no-adapter", "--save-path", folder / "hf"))
    return Case(model, adapter, folder / "hf", load(model)[1].encode(PROMPT))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory, docstrings) -> Case:
    return make_case(tmp_path_factory.mktemp(request.param), FAMILIES[request.param], docstrings)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, docstrings) -> Case:
    return make_case(tmp_path_factory.mktemp("plain"), FAMILIES["grouped"], docstrings)


@pytest.fixture(scope="module")
def biased(tmp_path_factory, docstrings) -> Case:
    return make_case(tmp_path_factory.mktemp("biased"), FAMILIES["biases"], docstrings)


def export(case: Case, target: Path, kind: str, adapter: Path | None = None):
    """Run fuse.py for an adapter alone."""
    adapter = adapter or case.adapter
    flags = ["--model", case.folder, "--adapter-file", adapter, "--save-path", target]
    return call_script("fuse.py", *flags, "--format", kind)


def our_logits(case: Case, adapter: Path) -> np.ndarray:
    logits, _ = load(case.folder, adapter)[0](mx.array([case.ids]))
    return np.array(logits)


def read_by_transformers(case: Case) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)


def logits_of_peft(case: Case, model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([case.ids])).logits.numpy()


def read_by_peft(case: Case, folder: Path) -> peft.PeftModel:
    """PEFT's model, which warns where the file and the config do not go together."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(read_by_transformers(case), folder)


def read_by_mlx_lm(case: Case, folder: Path):
    model, _ = mlx_lm.load(str(case.base), adapter_path=str(folder))
    model.set_dtype(mx.float32)
    return model


# -------------------------------------------------------------------------------------------------
# Out


def test_peft_computes_what_we_do(case, tmp_path):
    succeed(export(case, tmp_path / "peft", "peft"))
    model = read_by_peft(case, tmp_path / "peft")
    stored = safetensors.torch.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert stored.keys() == peft.get_peft_model_state_dict(model).keys()
    expected = our_logits(case, case.adapter)
    assert np.abs(expected - our_logits(case, None)).max() > 0.1
    np.testing.assert_allclose(logits_of_peft(case, model), expected, atol=1e-4)
    ids = torch.tensor([case.ids])
    text = model.generate(input_ids=ids, max_new_tokens=60, do_sample=False)
    assert text[0, len(case.ids) :].tolist() == greedy(load(case.folder, case.adapter)[0], case.ids)


def test_mlx_lm_computes_what_we_do(case, tmp_path):
    succeed(export(case, tmp_path / "mlx", "mlx-lm"))
    model = read_by_mlx_lm(case, tmp_path / "mlx")
    expected = our_logits(case, case.adapter)
    np.testing.assert_allclose(model(mx.array([case.ids])), expected, atol=1e-4)
    text = [token for token, _ in mlx_generate_step(mx.array(case.ids), model, max_tokens=60)]
    assert text == greedy(load(case.folder, case.adapter)[0], case.ids)


def write_adapter(case: Case, path: Path, groups, scale: float = 3.0) -> Path:
    """Write an adapter of random matrices. groups: of layers, projections and a rank each."""
    model = load(case.folder)[0]
    for what in groups:
        add_lora(model, *what, scale)
    rng = np.random.default_rng(2)
    matrices = {
        name: round_to(rng.normal(size=value.shape) * 0.1, 32)
        for name, value in adapters.to_numpy(model.trainable_parameters()).items()
    }
    with open(path, "wb") as file:
        adapters.write_adapter(file, matrices, scale)
    return path


def test_layers_may_differ_in_what_they_adapt(plain, tmp_path):
    """The top one is as it was, too: mlx-lm adapts it, and the file lacks it."""
    groups = [([0], ["wq", "w2"], 3), ([1], ["wk", "wo"], 3)]
    adapter = write_adapter(plain, tmp_path / "a.npz", groups, scale=0.7)
    expected = our_logits(plain, adapter)
    for kind in ("peft", "mlx-lm"):
        succeed(export(plain, tmp_path / kind, kind, adapter))
    theirs = read_by_peft(plain, tmp_path / "peft")
    np.testing.assert_allclose(logits_of_peft(plain, theirs), expected, atol=1e-4)
    theirs = read_by_mlx_lm(plain, tmp_path / "mlx-lm")
    np.testing.assert_allclose(theirs(mx.array([plain.ids])), expected, atol=1e-4)
    matrices, scale = adapter_formats.read_matrices(adapter, 16)
    for kind in ("peft", "mlx-lm"):
        back, their_scale = adapter_formats.read_matrices(tmp_path / kind, 16)
        assert their_scale == pytest.approx(scale, rel=1e-12)
        assert back.keys() == matrices.keys()
        assert all((back[name] == matrices[name]).all() for name in back)


def test_several_ranks_are_refused(plain, tmp_path):
    groups = [([1], ["wq"], 3), ([2], ["wq"], 4)]
    adapter = write_adapter(plain, tmp_path / "a.npz", groups)
    for kind, library in (("peft", "PEFT"), ("mlx-lm", "mlx-lm")):
        says = error_of(export(plain, tmp_path / kind, kind, adapter))
        assert f"has the ranks 3 and 4, and the format of {library} has one" in says
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("kind", ["peft", "mlx-lm"])
def test_an_export_takes_the_place_of_its_own_alone(plain, tmp_path, kind):
    for _ in range(2):
        succeed(export(plain, tmp_path / "a", kind))
    first = contents(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    succeed(export(plain, tmp_path / "a", kind))
    assert contents(tmp_path / "a") == {**first, "notes.txt": b"mine"}

    for name in first:  # what another tool wrote
        shutil.copytree(tmp_path / "a", tmp_path / name)
        (tmp_path / name / name).unlink()
        if name.endswith(".safetensors"):
            safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / name / name)
            before = contents(tmp_path / name)
            says = error_of(export(plain, tmp_path / name, kind))
            assert "that fuse.py did not make there: name another" in says
            assert contents(tmp_path / name) == before
    before = contents(plain.base)
    assert "did not make there" in error_of(export(plain, plain.base, kind))
    assert contents(plain.base) == before


def test_the_adapter_alone_takes_no_flags_of_the_model(plain, tmp_path):
    arguments = ["--model", plain.folder, "--adapter-file", plain.adapter, "--format", "peft"]
    for flags in (["--no-adapter"], ["--dtype", "float16"], ["--data", "."]):
        says = error_of(call_script("fuse.py", *arguments, "--save-path", tmp_path / "a", *flags))
        assert "writes the adapter alone, in float32: leave out --no-adapter" in says
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------
# In


def train_by_peft(case: Case, folder: Path, steps: int = 3, **settings) -> peft.PeftModel:
    """Train an adapter for some steps, on the prompt, and save it."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 10, "target_modules": ALL_OF_THEIRS, **settings}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(read_by_transformers(case), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    ids = torch.tensor([case.ids])
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return model.eval()


def assert_same_tensors(folder: Path, other: Path, name: str) -> None:
    ours, theirs = (safetensors.numpy.load_file(path / name) for path in (other, folder))
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype == np.float32
        assert ours[key].tobytes() == theirs[key].tobytes(), key


def test_what_peft_trained_computes_the_same_here_and_goes_out_as_it_was(case, tmp_path):
    rank_stabilized = case.base.parent.name.startswith("scaled")
    model = train_by_peft(case, tmp_path / "theirs", use_rslora=rank_stabilized)
    expected = logits_of_peft(case, model)
    assert np.abs(expected - our_logits(case, None)).max() > 0.1
    np.testing.assert_allclose(our_logits(case, tmp_path / "theirs"), expected, atol=1e-4)
    succeed(export(case, tmp_path / "ours", "peft", tmp_path / "theirs"))
    assert_same_tensors(tmp_path / "theirs", tmp_path / "ours", "adapter_model.safetensors")
    again = logits_of_peft(case, read_by_peft(case, tmp_path / "ours"))
    np.testing.assert_allclose(again, expected, atol=1e-5)


def train_by_mlx_lm(case: Case, folder: Path, data: Path, **settings):
    """Train an adapter for some steps with mlx-lm's own script."""
    settings = {
        **mlx_lm.lora.CONFIG_DEFAULTS,
        **{"model": str(case.base), "train": True, "data": str(data), "iters": 3},
        **{"adapter_path": str(folder), "batch_size": 1, "num_layers": 2, "val_batches": 1},
        **{"learning_rate": 1e-2, "steps_per_eval": 10, "max_seq_length": 64},
        "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 1.5},
        **settings,
    }
    mx.disable_compile()  # which takes seconds on a CPU
    try:
        mlx_lm.lora.run(Namespace(**settings))
    finally:
        mx.enable_compile()


def test_what_mlx_lm_trained_computes_the_same_here_and_goes_out_as_it_was(case, data, tmp_path):
    train_by_mlx_lm(case, tmp_path / "theirs", data)
    expected = read_by_mlx_lm(case, tmp_path / "theirs")(mx.array([case.ids]))
    assert np.abs(expected - our_logits(case, None)).max() > 0.1
    np.testing.assert_allclose(our_logits(case, tmp_path / "theirs"), expected, atol=1e-4)
    succeed(export(case, tmp_path / "ours", "mlx-lm", tmp_path / "theirs"))
    assert_same_tensors(tmp_path / "theirs", tmp_path / "ours", "adapters.safetensors")
    again = read_by_mlx_lm(case, tmp_path / "ours")(mx.array([case.ids]))
    np.testing.assert_array_equal(again, expected)


@pytest.fixture(scope="module")
def folders(plain, tmp_path_factory) -> dict[str, Path]:
    """The same adapter in each format."""
    folder = tmp_path_factory.mktemp("folders")
    for kind in ("peft", "mlx-lm"):
        succeed(export(plain, folder / kind, kind))
    return {kind: folder / kind for kind in ("peft", "mlx-lm")}


@pytest.mark.parametrize("kind", ["peft", "mlx-lm"])
def test_bfloat16_and_float16_are_read(plain, folders, tmp_path, kind):
    """What the adapter holds, multiples of 1/32 below 1, fits both."""
    for dtype in (torch.bfloat16, torch.float16):
        folder = shutil.copytree(folders[kind], tmp_path / str(dtype))
        (path,) = folder.glob("*.safetensors")
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file({k: v.to(dtype) for k, v in tensors.items()}, path)
        expected, _ = adapter_formats.read_matrices(plain.adapter, 16)
        matrices, scale = adapter_formats.read_matrices(folder, 16)
        assert scale == 3.0
        assert all((matrices[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize("kind", ["peft", "mlx-lm"])
def test_ranks_get_all_from_what_is_read_for_them(plain, folders, kind):
    """A rank without the files, on another machine, has but what rank 0 sends."""
    there = {Path("elsewhere") / name: data for name, data in contents(folders[kind]).items()}
    expected, _ = adapter_formats.read_matrices(plain.adapter, 16)
    matrices, scale = adapter_formats.read_matrices("elsewhere", 16, there.get)
    assert scale == 3.0
    assert matrices.keys() == expected.keys()
    assert all((matrices[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize("kind", ["peft", "mlx-lm"])
def test_scripts_take_a_folder_as_an_adapter_file(plain, folders, data, tmp_path, kind):
    common = ["--model", plain.folder, "--data", data, "--dtype", "float32"]
    use = ["--test", "--prompt", "Applies", "--temp", "0", "-n", "20", "--adapter-file"]
    theirs = call_script("lora.py", *common, *use, folders[kind])
    ours = call_script("lora.py", *common, *use, plain.adapter)
    assert theirs.returncode == 0, theirs.stderr
    assert theirs.stdout == ours.stdout and "Test loss" in ours.stdout

    # Training starts a new run from it, and fuse.py merges it.
    train = ["--train", "--iters", "1", "--adapter-file", tmp_path / "a.npz"]
    process = call_script("lora.py", *common, *train, "--resume-adapter-file", folders[kind])
    assert process.returncode == 0, process.stderr
    assert f"A new run begins from the weights in {folders[kind]}" in process.stdout
    before, after = (adapters.read_adapter(path) for path in (plain.adapter, tmp_path / "a.npz"))
    assert adapters.parse_scale((tmp_path / "a.npz").read_bytes(), "a.npz") == 3.0
    assert before.keys() == after.keys()
    changes = [np.abs(before[name] - after[name]).max() for name in before]
    assert 0 < max(changes) < 1e-4  # one step of 1e-5
    for name, adapter in (("theirs", folders[kind]), ("ours", plain.adapter)):
        flags = ["--model", plain.folder, "--save-path", tmp_path / name, "--format", "mlx"]
        succeed(call_script("fuse.py", *flags, "--adapter-file", adapter))
    assert contents(tmp_path / "theirs") == contents(tmp_path / "ours")


# -------------------------------------------------------------------------------------------------
# What the network cannot hold


def refusal(case: Case, folder: Path) -> str:
    """What `load_adapter` says."""
    model = load(case.folder)[0]
    with pytest.raises(ValueError) as error:
        lora.load_adapter(model, folder)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "setting", "tensor"),
    [
        ({"use_dora": True}, "use_dora, DoRA", "which is DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save, modules", "embedding or output"),
        ({"bias": "all"}, "bias 'all', trained biases", "a trained bias"),
        ({"lora_bias": True}, "lora_bias, trained biases", "a trained bias"),
        ({"trainable_token_indices": [3]}, "embeddings of tokens", "a trained embedding"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern, several ranks", "has rank 2, where"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern, several scales", None),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the model's own weights", None),
        ({"init_lora_weights": "olora"}, "'olora', which changes the model's own weights", None),
        ({"target_modules": ["embed_tokens"]}, None, "embedding or"),
        ({"target_modules": ["lm_head"]}, None, "embedding or"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of PEFT's, that some of this is unusual
def test_what_peft_alone_can_do_is_refused_by_name(biased, tmp_path, settings, setting, tensor):
    """By its setting; and by its tensors, where a config without the setting lies beside them."""
    train_by_peft(biased, tmp_path, steps=0, **settings)
    if setting is not None:
        assert setting in refusal(biased, tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        for name in settings:
            del config[name]
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if tensor is not None:
        assert tensor in refusal(biased, tmp_path)


@pytest.mark.parametrize(
    ("settings", "setting", "tensor"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type 'dora', DoRA", "which is DoRA"),
        ({"fine_tune_type": "full"}, "'full', weights that are trained", "lacks lora_parameters"),
        ({"keys": ["model.embed_tokens"]}, None, "LoRA of an embedding or the output"),
        ({"alpha": 16}, None, "has alpha, by which old versions of mlx-lm multiply"),
    ],
)
def test_what_mlx_lm_alone_can_do_is_refused_by_name(
    plain, data, tmp_path, settings, setting, tensor
):
    lora_parameters = {"rank": 4, "dropout": 0.0, "scale": 1.5}
    if "fine_tune_type" not in settings:
        lora_parameters |= settings
        settings = {}
    train_by_mlx_lm(plain, tmp_path, data, iters=1, lora_parameters=lora_parameters, **settings)
    if setting is not None:
        assert setting in refusal(plain, tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        config["fine_tune_type"] = "lora"
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert tensor in refusal(plain, tmp_path)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = safetensors.numpy.load_file(path)
    changed = dict(change(name, tensor) for name, tensor in tensors.items())
    safetensors.numpy.save_file({k: v for k, v in changed.items() if k}, path)


def cut(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda f: edit_config(f, peft_type="IA3"), "peft_type 'IA3', and not LORA"),
        (lambda f: edit_config(f, r=0), "r is 0, and not a number above 0"),
        (lambda f: edit_config(f, r=True), "r is True, and not a number above 0"),
        (lambda f: edit_config(f, lora_alpha="16"), "lora_alpha is '16', and not a number"),
        (lambda f: edit_config(f, lora_alpha=10**400), "lora_alpha is 100000000"),
        (lambda f: edit_config(f, lora_alpha=1e6), "is 250000.0, and not a number"),
        (lambda f: edit_config(f, r=10**400), "r is 1000000000"),
        (lambda f: edit_config(f, r=8), "has rank 4, where adapter_config.json says 8"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json is not JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "is neither PEFT's nor mlx-lm's"),
        (lambda f: (f / "adapter_config.json").unlink(), "is no adapter: name the .npz file"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "is missing: copy the whole folder"),
        (cut, "adapter_model.safetensors is damaged"),
        (lambda f: edit_tensors(f, lambda k, v: (k.replace("up_proj", "fc1"), v)),
         "mlp.fc1.lora_A.weight, which is no LoRA matrix of self_attn.q_proj"),
        (lambda f: edit_tensors(f, lambda k, v: (k.replace("model.layers", "model.h"), v)),
         "h.1.mlp.down_proj.lora_A.weight, which is no LoRA matrix: that"),
        (lambda f: edit_tensors(f, lambda k, v: (k.replace("layers.2", "layers.7"), v)),
         "adapts layer 7 of a model that has 3 layers"),
        (lambda f: edit_tensors(f, lambda k, v: (k, v.astype(np.int32))), "no matrix of floats"),
        (lambda f: edit_tensors(f, lambda k, v: (k, v * np.float32("nan"))), "is not finite"),
        (lambda f: edit_tensors(f, lambda k, v: (k, v[:, None])), "is not a matrix of floats"),
        (lambda f: edit_tensors(f, lambda k, v: ("lora_A" in k and k, v)), "lacks layers.1"),
        (lambda f: edit_tensors(f, lambda k, v: (None, v)), "holds no LoRA matrices"),
    ],
)  # fmt: skip
def test_a_folder_that_is_wrong_is_named(plain, folders, tmp_path, edit, says):
    folder = shutil.copytree(folders["peft"], tmp_path / "a")
    edit(folder)
    assert says in refusal(plain, folder)


def test_an_adapter_of_another_model_is_refused(plain, biased, folders, tmp_path):
    """Of other sizes, whether or not its heads are."""
    succeed(export(biased, tmp_path / "a", "mlx-lm"))
    assert "use the model that it was trained on" in refusal(plain, tmp_path / "a")
    folder = shutil.copytree(folders["peft"], tmp_path / "b")
    edit_tensors(folder, lambda k, v: (k, v[:9] if "lora_B" in k else v))
    assert "has the shape (9, 4), which is not of whole heads of 16" in refusal(plain, folder)


def test_a_pickle_is_not_read(plain, folders, tmp_path):
    folder = shutil.copytree(folders["peft"], tmp_path / "a")
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.bin is a pickle, which can run any code" in refusal(plain, folder)


def test_scripts_tell_of_it_before_they_load_the_model(folders, tmp_path):
    folder = shutil.copytree(folders["peft"], tmp_path / "a")
    for edit, says in (
        (lambda: edit_config(folder, use_dora=True), "has use_dora, DoRA, which cannot be used"),
        (lambda: (folder / "adapter_config.json").unlink(), "is no adapter: name the .npz file"),
    ):
        edit()
        for flags in (["lora.py", "--prompt", "x"], ["fuse.py", "--save-path", tmp_path / "out"]):
            process = call_script(*flags, "--model", "no", "--adapter-file", folder)
            assert process.returncode == 2 and says in process.stderr
            assert len(process.stderr.splitlines()) == 1
