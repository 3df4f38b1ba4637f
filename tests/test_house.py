"""The rules of parts/__init__.py: who imports whom, and in which order."""

import ast
import graphlib
import re
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = sorted(ROOT.glob("*.py"))
PARTS = sorted(ROOT.glob("parts/*.py"))
MODULES = [*SCRIPTS, *PARTS, *sorted(ROOT.glob("base-model/*.py"))]
WITHOUT_MLX = (
    *("cli", "files", "records", "chat", "chat_renderer", "token_rows", "token_cache"),
    *("source_checkpoints", "hugging_face"),
    *("tokenizers", "source_tokenizers", "byte_level_bpe"),
)
ASK_FOR_THE_DEVICE = r"device|ops.*|merged_linear|decoder.*|training_layers"
READERS = ROOT / "cwk_create_dataset.py"  # which each process that reads a package imports again


def imports(file: Path, at_once: bool = False) -> list[str]:
    """The names that a file imports, in their order; `at_once`: when it is imported itself."""
    names = []
    tree = ast.parse(file.read_text("utf-8"))
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def own_files(names: list[str]) -> set[Path]:
    """The suite's files among imported names."""
    found = set()
    for first, *others in (name.split(".") for name in names):
        path = ROOT / first / others[0] if first == "parts" else ROOT / first
        if path.with_suffix(".py").exists():
            found.add(path.with_suffix(".py"))
    return found


def loaded(file: Path) -> set[str]:
    """The packages, not the suite's own, that are loaded with a file."""
    files, waiting = {file}, [file]
    while waiting:
        found = own_files(imports(waiting.pop(), at_once=True)) - files
        files |= found
        waiting += found
    return {name.split(".")[0] for each in files for name in imports(each, at_once=True)}


@pytest.mark.parametrize("part", PARTS, ids=lambda file: file.stem)
def test_a_part_imports_no_script(part):
    assert own_files(imports(part)) & set(SCRIPTS) == set()


def test_the_imports_go_in_no_circle():
    graph = {file: own_files(imports(file)) for file in MODULES}
    assert sum(map(len, graph.values())) > 20
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)
def test_a_module_imports_the_device_before_mlx(file):
    """The device loads the BLAS that MLX is to use."""
    names = imports(file, at_once=True)
    of_mlx = [i for i, name in enumerate(names) if name.split(".")[0] == "mlx"]
    if of_mlx and file.name != "device.py":
        assert "parts.device" in names[: of_mlx[0]]


@pytest.mark.parametrize("name", WITHOUT_MLX)
def test_a_part_of_the_ground_floor_loads_no_mlx(name):
    assert "mlx" not in loaded(ROOT / "parts" / f"{name}.py")


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)
def test_the_device_is_asked_for_in_few_parts_and_as_an_attribute(file):
    """So a test has one lever."""
    asked = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Attribute | ast.Name)
        and ast.unparse(node).split(".")[-1] in ("ON_CPU", "has_cuda", "has_metal")
    ]
    if not re.fullmatch(ASK_FOR_THE_DEVICE, file.stem):
        assert asked == []
    elif file.stem != "device":
        assert {name.split(".")[0] for name in asked} <= {"device"}


def test_what_the_readers_of_packages_start_from_is_light():
    assert loaded(READERS) & {"mlx", "numpy", "torch", "tqdm", "sentencepiece"} == set()
    assert "multiprocessing" in loaded(READERS)


def test_every_part_is_in_the_list_of_parts():
    listed = [line.split("  ")[0] for line in (ROOT / "parts/__init__.py").read_text().splitlines()]
    assert sorted({file.stem for file in PARTS} - {"__init__"} - set(listed)) == []
