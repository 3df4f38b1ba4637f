"""cwk_create_dataset.py on MLX itself and on small packages made for the tests."""

import ast
import contextlib
import functools
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
import sentencepiece
from conftest import MISTRAL_TOKENIZER, ROOT, run_script

import cwk_create_dataset as dataset
import lora

OLD_RELU = '''
class ReLU:
    """Applies the Rectified Linear Unit.

    Simply ``mx.maximum(x, 0)``."""
'''


def read(folder) -> dict[str, list[str]]:
    return {
        name: [json.loads(line)["text"] for line in (folder / name).read_text().splitlines()]
        for name in dataset.DATASET
    }


@pytest.fixture(scope="module")
def mlx_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlx")
    process = run_script("cwk_create_dataset.py", "--data-folder", folder)
    assert process.returncode == 0, process.stderr
    return folder


def make_package(folder, name, **modules) -> None:
    """A package of the given modules; `__init__` is its own."""
    (folder / name).mkdir()
    for module, source in {"__init__": "", **modules}.items():
        (folder / name / f"{module}.py").write_text(source)


def documented_functions(n: int) -> str:
    """The source of functions f0, f1, ..., each with a docstring of its own."""
    return "".join(f'def f{i}():\n    "Function {i}."\n\n' for i in range(n))


def run(folder, *arguments):
    return run_script("cwk_create_dataset.py", *arguments, PYTHONPATH=str(folder))


@pytest.mark.parametrize(
    ("name", "dotted_name"),
    [
        ("ReLU", "mlx.nn.ReLU"),
        ("add", "mlx.core.add"),
        ("array.astype", "mlx.core.array.astype"),
        ("fft.fft", "mlx.core.fft.fft"),
        ("Module.update", "mlx.nn.Module.update"),
        ("Adam", "mlx.optimizers.Adam"),
        ("tree_map", "mlx.utils.tree_map"),
        ("Device", "mlx.core.Device"),
    ],
)
def test_an_object_has_one_record_under_its_shortest_public_name(mlx_data, name, dotted_name):
    texts = [text for texts in read(mlx_data).values() for text in texts]
    found = [text for text in texts if text.startswith(f"Q: What is {name} in mlx?\nA: ")]
    assert [text.split("\nA: ")[1].split(" ")[0] for text in found] == [dotted_name]
    assert not [text for text in texts if "\nA: mlx.nn.layers." in text]


def test_the_record_of_relu_begins_as_documented(mlx_data):
    relu = "Q: What is ReLU in mlx?\nA: mlx.nn.ReLU Applies the Rectified Linear Unit."
    texts = [text for texts in read(mlx_data).values() for text in texts]
    assert sum(text.startswith(f"{relu}\n\nSimply ``mx.maximum(x, 0)``.") for text in texts) == 1


def documented(tree: ast.AST, path: str) -> Iterator[str]:
    """The dotted names of public functions and classes with a docstring in a syntax tree."""
    for node in ast.iter_child_nodes(tree):
        is_class = isinstance(node, ast.ClassDef)
        if (is_class or isinstance(node, ast.FunctionDef)) and not node.name.startswith("_"):
            setter = any(isinstance(d, ast.Attribute) for d in node.decorator_list)
            if ast.get_docstring(node) and not setter:
                yield f"{path}.{node.name}"
            if is_class:
                yield from documented(node, f"{path}.{node.name}")


def names_in_stubs() -> set[str]:
    """What MLX's own type stubs, made from its reference, document of its compiled module."""
    folder = Path(mx.__file__).parent / "core"
    names = set()
    for path in folder.glob("*.pyi"):
        module = "mlx.core" if path.stem == "__init__" else f"mlx.core.{path.stem}"
        names |= set(documented(ast.parse(path.read_text(encoding="utf-8")), module))
    return names


def names_in_sources() -> set[str]:
    """What MLX's Python sources document, under the public names of the modules that hold them."""
    names = set()
    for module, folder in (("mlx.nn", "nn/layers"), ("mlx.optimizers", "optimizers")):
        for path in (Path(mx.__file__).parent / folder).glob("*.py"):
            public = set(dir(importlib.import_module(module)))
            for name in documented(ast.parse(path.read_text(encoding="utf-8")), module):
                if name.removeprefix(f"{module}.").split(".")[0] in public:
                    names.add(name)
    for module in ("mlx.nn.losses", "mlx.nn.init", "mlx.utils"):
        source = inspect.getsource(importlib.import_module(module))
        names |= set(documented(ast.parse(source), module))
    return names


def test_every_name_that_mlx_documents_has_one_record(mlx_data):
    answers = [
        text.split("\nA: ")[1].split(" ")[0] for texts in read(mlx_data).values() for text in texts
    ]
    assert len(answers) == len(set(answers))
    expected = names_in_stubs() | names_in_sources()
    assert len(expected) > 520
    missing = {name for name in expected - set(answers) if not is_alias(name, set(answers))}
    assert not missing


def is_alias(name: str, answers: set[str]) -> bool:
    """Whether the object of that name has its record under another, equally short name."""
    value = functools.reduce(getattr, name.split(".")[1:], importlib.import_module("mlx"))
    for answer in answers:
        parts = answer.split(".")[1:]
        with contextlib.suppress(AttributeError):
            if functools.reduce(getattr, parts, importlib.import_module("mlx")) is value:
                return answer.count(".") <= name.count(".")
    return False


def test_no_docstring_of_one_file_stands_in_another(mlx_data):
    docstrings = {
        name: {text.split("\nA: ", 1)[1].split(" ", 1)[1] for text in texts}
        for name, texts in read(mlx_data).items()
    }
    train, valid, test = docstrings.values()
    assert not train & valid
    assert not train & test
    assert not valid & test


def test_a_tenth_of_the_records_is_for_testing_and_a_tenth_for_validation(mlx_data):
    sizes = {name: len(texts) for name, texts in read(mlx_data).items()}
    total = sum(sizes.values())
    assert total > 500
    assert abs(sizes["test.jsonl"] - total / 10) <= 3
    assert abs(sizes["valid.jsonl"] - total / 10) <= 3


def test_two_runs_give_the_same_files_byte_for_byte(mlx_data, tmp_path):
    process = run_script("cwk_create_dataset.py", "--data-folder", tmp_path, PYTHONHASHSEED="5")
    assert process.returncode == 0, process.stderr
    for name in dataset.DATASET:
        assert (tmp_path / name).read_bytes() == (mlx_data / name).read_bytes()


def test_a_record_is_the_documented_line_byte_for_byte(tmp_path):
    make_package(tmp_path, "mlx_then", __init__="from mlx_then.nn import *", nn=OLD_RELU)
    make_package(tmp_path, "more", __init__='def a():\n    "A."\n\ndef b():\n    "B."\n')
    process = run(tmp_path, "mlx_then", "more", "--data-folder", tmp_path / "data")
    assert process.returncode == 0, process.stderr
    lines = [line for name in dataset.DATASET for line in (tmp_path / "data" / name).open()]
    assert (
        '{"text": "Q: What is ReLU in mlx_then?\\nA: mlx_then.ReLU Applies the Rectified Linear '
        'Unit.\\n\\nSimply ``mx.maximum(x, 0)``."}\n'
    ) in lines


def test_private_inherited_and_foreign_objects_have_no_record(tmp_path):
    make_package(
        tmp_path,
        "lib",
        __init__="from json import dumps\nfrom lib._inner import shown, Child\n",
        _inner="""
def shown():
    "Shown."

def _hidden():
    "Hidden."

class Parent:
    "Parent."
    def method(self):
        "Method."

class Child(Parent):
    def method(self):
        pass
    @property
    def size(self):
        "Size."
    @classmethod
    def make(cls):
        "Make."
""",
        tests='raise SystemExit("tests are not imported")',
    )
    process = run(tmp_path, "lib", "--data-folder", tmp_path / "data")
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    texts = sorted(text for texts in read(tmp_path / "data").values() for text in texts)
    assert texts == [
        "Q: What is Child.make in lib?\nA: lib.Child.make Make.",
        "Q: What is Child.size in lib?\nA: lib.Child.size Size.",
        "Q: What is shown in lib?\nA: lib.shown Shown.",
    ]


def test_a_module_that_cannot_be_imported_is_named_and_costs_no_other(tmp_path):
    good = documented_functions(5)
    make_package(
        tmp_path,
        "lib",
        bad="import no_such_module",
        good=good,
        leaves="import sys\nprint('noise')\nsys.exit(3)",
    )
    process = run(tmp_path, "lib", "--data-folder", tmp_path / "data")
    assert process.returncode == 0
    assert sum(map(len, read(tmp_path / "data").values())) == 5
    assert "noise" not in process.stdout
    assert (
        "skipped lib.bad: ModuleNotFoundError: No module named 'no_such_module'" in process.stdout
    )
    assert "skipped lib.leaves: SystemExit: 3" in process.stdout


TROUBLE = {
    "raises": "raise RuntimeError('on purpose')",
    "leaves": "import sys; sys.exit('bye')",
    "interrupts": "raise KeyboardInterrupt",
    "ends": "import os; os._exit(3)",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "asks": "input('what now? ')",
    "hangs": "import time; time.sleep(10**6)",
    "lacks": "import a_package_that_nobody_has",
}
HARMLESS = {
    "prints": "import os; print('noise'); os.write(1, b'noise'); os.write(2, b'noise')",
    "starts": "import threading, time\nthreading.Thread(target=time.sleep, args=(10**6,)).start()",
    "shows": "import os; assert 'DISPLAY' not in os.environ",
    "proxies": """
class Proxy:
    def __getattribute__(self, name):
        raise RuntimeError(name)
    def __call__(self):
        pass
request = Proxy()
""",
    "manages": "import multiprocessing; multiprocessing.Manager()",
    "homeless": """
class Local:
    __slots__ = ()
    @property
    def __module__(self):
        return 5
class Kind(type):
    def __getattribute__(cls, name):
        raise RuntimeError(name)
class Odd(metaclass=Kind):
    'Not to be asked.'
""",
    "nameless": """
class Kind(type):
    @property
    def __name__(cls):
        raise RuntimeError('on purpose')
class Nameless(metaclass=Kind):
    'Kind(x) makes one.'
""",
}
NEVER = dict.fromkeys(["__main__", "conftest", "tests", "test_it"], "import os; os._exit(9)")


def test_modules_that_misbehave_cost_no_other_and_are_named(tmp_path, mlx_data, monkeypatch, capfd):
    fine = 'def work():\n    """Works in {name}."""\n'
    make_package(
        tmp_path,
        "troubled",
        **{name: f"{source}\n{fine.format(name=name)}" for name, source in TROUBLE.items()},
        **{name: f"{source}\n{fine.format(name=name)}" for name, source in HARMLESS.items()},
        **NEVER,
    )
    make_package(tmp_path, "broken", __init__="import os; os.abort()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(dataset, "MODULE_SECONDS", 8)
    packages = ["troubled", "mlx", "broken", "no_such_package"]
    dataset.create_dataset(packages, tmp_path / "data", processes=2, tokenizer=None)

    output, errors = capfd.readouterr()
    for name, reason in {
        "raises": "RuntimeError: on purpose",
        "leaves": "SystemExit: bye",
        "interrupts": "KeyboardInterrupt",
        "ends": "it exited with 3",
        "crashes": "killed by SIGSEGV",
        "asks": "EOFError: EOF when reading a line",
        "hangs": "it took longer than 8 s",
        "lacks": "ModuleNotFoundError: No module named 'a_package_that_nobody_has'",
    }.items():
        assert f"skipped troubled.{name}: {reason}\n" in output
    assert "skipped broken: killed by SIGABRT\n" in output
    assert "skipped no_such_package: ModuleNotFoundError" in output
    assert output.count("skipped") == len(TROUBLE) + 2
    assert "noise" not in output + errors

    texts = {text for file in read(tmp_path / "data").values() for text in file}
    assert {text for file in read(mlx_data).values() for text in file} < texts
    assert {text for text in texts if "troubled" in text} == {
        "Q: What is Nameless in troubled?\nA: troubled.nameless.Nameless Kind(x) makes one.",
        *(
            f"Q: What is {n}.work in troubled?\nA: troubled.{n}.work Works in {n}."
            for n in HARMLESS
        ),
    }


def test_the_files_do_not_depend_on_the_number_of_processes(tmp_path):
    sets = "def f(): pass\nf.__doc__ = f'One of {set(map(str, range(50)))}.'"
    make_package(tmp_path, "printed", sets=sets)
    packages = ["printed", "sentencepiece", "tqdm", "json", "email"]
    folders = []
    for processes in ("1", "3"):
        folders.append(tmp_path / processes)
        process = run_script(
            "cwk_create_dataset.py", *packages, "--processes", processes,
            "--data-folder", folders[-1], PYTHONPATH=str(tmp_path),
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        packages.reverse()
    assert read(folders[0]) == read(folders[1])


def test_a_package_that_takes_too_long_is_named_as_such(tmp_path, monkeypatch, capfd):
    slow = "import time; time.sleep(1.5)"
    first = '"""It is slow."""'
    make_package(tmp_path, "slow", __init__=first, a=slow, b=slow, c=slow, d=slow)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dataset, "MODULE_SECONDS", 4)
    monkeypatch.setattr(dataset, "PACKAGE_SECONDS", 5)
    dataset.create_dataset(["slow", "json"], tmp_path / "data", processes=2, tokenizer=None)
    skipped = re.findall("skipped .*", capfd.readouterr()[0])
    assert len(skipped) == 1
    assert re.fullmatch(r"skipped (slow\.\w(, |: ))+the package took longer than 5 s", skipped[0])
    texts = {text for file in read(tmp_path / "data").values() for text in file}
    assert "Q: What is slow in slow?\nA: slow It is slow." in texts


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_processes(tmp_path, number, status):
    make_package(tmp_path, "slow", hangs="while True: pass")
    process = subprocess.Popen(
        [sys.executable, ROOT / "cwk_create_dataset.py", "slow", "--data-folder", tmp_path / "d"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(3)
    pgrep = ["pgrep", "-P", str(process.pid)]
    children = subprocess.run(pgrep, capture_output=True, text=True, check=True).stdout.split()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert errors == ""
    deadline = time.monotonic() + 20
    while subprocess.run(["ps", "-p", ",".join(children)], capture_output=True).returncode == 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (tmp_path / "d").exists()


def test_tokens_are_counted_with_the_tokenizer_given(tmp_path):
    process = run_script(
        "cwk_create_dataset.py", "json", "--data-folder", tmp_path,
        "--tokenizer", MISTRAL_TOKENIZER,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    model = sentencepiece.SentencePieceProcessor(model_file=str(MISTRAL_TOKENIZER))
    texts = read(tmp_path)["train.jsonl"]
    expected = sum(len(model.encode(text)) for text in texts)
    line = next(line for line in process.stdout.splitlines() if "train.jsonl" in line)
    assert f": {len(texts)} records, {expected} tokens, the longest {max(map(len, texts))}" in line


def test_hugging_faces_datasets_reads_the_files(mlx_data, tmp_path):
    import datasets  # here, as it takes a second

    files = {"train": str(mlx_data / "train.jsonl"), "test": str(mlx_data / "test.jsonl")}
    loaded = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path))
    assert loaded["train"]["text"][:] == read(mlx_data)["train.jsonl"]
    assert loaded["test"]["text"][:] == read(mlx_data)["test.jsonl"]


def test_lora_reads_the_files(mlx_data):
    for name in dataset.DATASET:
        assert list(lora.Dataset(mlx_data / name)) == read(mlx_data)[name]


def test_what_python_writes_by_itself_is_no_docstring(tmp_path):
    make_package(
        tmp_path,
        "generated",
        __init__='''"""The package itself."""''',
        a="""
from collections import namedtuple
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

@dataclass
class Data:
    x: int = 0

Pair = namedtuple("Pair", "x y")

class Named(NamedTuple):
    x: int

class Colour(Enum):
    RED = 1

class Error(ValueError):
    pass

@dataclass
class Told:
    \"\"\"Told(x) is told.\"\"\"
    x: int

def one():
    \"\"\"One.\"\"\"

def two():
    \"\"\"Two.\"\"\"
""",
    )
    process = run(tmp_path, "generated", "--data-folder", tmp_path / "data")
    assert process.returncode == 0, process.stderr
    texts = {text for file in read(tmp_path / "data").values() for text in file}
    assert {text.split()[3] for text in texts} == {"generated", "Told", "one", "two"}


def test_a_package_without_docstrings_is_one_line_and_writes_nothing(tmp_path):
    process = run(tmp_path, "no_such_package", "--data-folder", tmp_path / "data")
    assert process.returncode == 2
    assert process.stderr.splitlines() == [
        "cwk_create_dataset.py: error: no_such_package gave 0 different docstrings, too few for "
        "three files: name installed packages (skipped no_such_package: "
        "ModuleNotFoundError: No module named 'no_such_package')"
    ]
    assert not (tmp_path / "data").exists()


def test_odd_modules_and_objects_cost_no_other(tmp_path):
    functions = documented_functions(5)
    make_package(
        tmp_path,
        "odd",
        lazy="_made = {}\ndef __getattr__(name):\n    return _made[name]",
        willing="def __getattr__(name):\n    return name",
        numbers="globals()[7] = 8",
        absent="import sys\nsys.modules[__name__] = object()",
        named="class Name:\n    def __format__(self, _):\n        raise RuntimeError\n"
        "class Odd:\n    def __call__(self):\n        pass\n"
        "odd = Odd()\nodd.__module__ = __name__\nodd.__qualname__ = Name()",
        forks="import os\nos.fork()",
        emptied='def nothing():\n    ".. currentmodule:: odd"',
        good=functions,
    )
    process = run(tmp_path, "odd", "--data-folder", tmp_path / "data")
    assert process.returncode == 0, process.stderr
    texts = [text for file in read(tmp_path / "data").values() for text in file]
    assert sorted(text.split()[7] for text in texts) == [f"odd.good.f{i}" for i in range(5)]


def test_what_a_module_makes_when_it_is_asked_for_has_its_short_name(tmp_path):
    functions = documented_functions(5)
    lazily = (
        "import importlib\n__all__ = ['f1', 'f2', 'broken']\n"
        "def __getattr__(name):\n"
        "    return getattr(importlib.import_module('lazy.deep'), name)"
    )
    make_package(tmp_path, "lazy", __init__=lazily, deep=functions)
    process = run(tmp_path, "lazy", "--data-folder", tmp_path / "data")
    assert process.returncode == 0, process.stderr
    names = {text.split()[7] for file in read(tmp_path / "data").values() for text in file}
    assert names == {"lazy.f1", "lazy.f2", "lazy.deep.f0", "lazy.deep.f3", "lazy.deep.f4"}


def test_a_docstring_that_begins_with_a_signature_is_one(tmp_path):
    classes = "".join(
        f'class C{i}:\n    """C{i}(x)\n\n    Example {i}:\n\n    >>> C{i}(1)\n    C{i}(1)"""\n\n'
        for i in range(4)
    )
    make_package(tmp_path, "signed", __init__=classes)
    process = run(tmp_path, "signed", "--data-folder", tmp_path / "data")
    assert process.returncode == 0, process.stderr
    assert sum(map(len, read(tmp_path / "data").values())) == 4


def test_equal_docstrings_do_not_fill_what_is_held_out(tmp_path):
    same = "".join(f'def same{i}():\n    "All the same."\n\n' for i in range(30))
    functions = documented_functions(30)
    make_package(tmp_path, "alike", __init__=same + functions)
    process = run(tmp_path, "alike", "--data-folder", tmp_path / "data")
    assert process.returncode == 0, process.stderr
    assert [len(file) for file in read(tmp_path / "data").values()] == [48, 6, 6]

    make_package(tmp_path, "one", __init__=same)
    process = run(tmp_path, "one", "--data-folder", tmp_path / "none")
    assert process.returncode == 2
    assert "one gave 1 different docstrings, too few for three files" in process.stderr


def test_files_that_this_script_did_not_make_are_not_replaced(tmp_path):
    own = '{"text": "My own example."}\n'
    (tmp_path / "valid.jsonl").write_text(own)
    process = run(tmp_path, "json", "--data-folder", tmp_path)
    assert process.returncode == 2
    assert process.stderr == (
        f"cwk_create_dataset.py: error: {tmp_path / 'valid.jsonl'} is not of this script: name "
        "another --data-folder, or give --overwrite\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["valid.jsonl"]
    assert (tmp_path / "valid.jsonl").read_text() == own

    assert run(tmp_path, "json", "--data-folder", tmp_path, "--overwrite").returncode == 0
    first = read(tmp_path)
    assert run(tmp_path, "json", "--data-folder", tmp_path).returncode == 0  # its own again
    assert read(tmp_path) == first

    process = run(tmp_path, "tqdm", "--data-folder", tmp_path)
    assert process.returncode == 2
    assert "holds records of json: name another --data-folder" in process.stderr
    assert run(tmp_path, "tqdm", "json", "--data-folder", tmp_path).returncode == 0


def test_a_package_that_gives_nothing_is_named_at_the_end_and_the_rest_is_written(tmp_path):
    make_package(tmp_path, "silent", __init__="def quiet(): pass")
    process = run(
        tmp_path, "json", "PyYAML", "silent", "absent", "--data-folder", tmp_path / "data"
    )
    assert process.returncode == 1
    assert process.stderr == (
        "cwk_create_dataset.py: error: no records of PyYAML: PyYAML is imported as yaml; absent: "
        "ModuleNotFoundError: No module named 'absent'; silent: nothing public in it has a "
        "docstring of its own. The others are there\n"
    )
    texts = [text for file in read(tmp_path / "data").values() for text in file]
    assert texts
    assert all(" in json?" in text for text in texts)


def test_modules_that_were_skipped_for_one_reason_are_one_line(tmp_path):
    missing = {f"m{i}": "import a_package_that_nobody_has" for i in range(7)}
    make_package(tmp_path, "lib", **missing, good=documented_functions(5))
    process = run(tmp_path, "lib", "--data-folder", tmp_path / "data")
    assert process.stdout.startswith(
        "skipped lib.m0, lib.m1, lib.m2, lib.m3, lib.m4 and 2 more: ModuleNotFoundError: No module "
        "named 'a_package_that_nobody_has'\n"
    )


def test_a_package_sees_neither_the_arguments_nor_the_modules_of_the_suite(tmp_path):
    (tmp_path / "models.py").write_text("class User: pass")
    make_package(
        tmp_path,
        "alone",
        __init__="import sys\nfrom models import User\nassert not sys.argv[1:]\n"
        "assert not [name for name in sys.modules if name.startswith('parts')]\n"
        + documented_functions(5),
    )
    process = run(tmp_path, "alone", "--data-folder", tmp_path / "data")
    assert process.returncode == 0, process.stderr + process.stdout


def test_a_question_has_one_answer(tmp_path):
    new = 'def new():\n    "A new {}."\n'
    make_package(
        tmp_path,
        "many",
        __init__=documented_functions(5),
        one=new.format("one") + 'class Thing:\n    def run(self):\n        "Run one."\n',
        two=new.format("two") + 'class Thing:\n    def run(self):\n        "Run two."\n',
        only='def once():\n    "Once."\n',
    )
    process = run(tmp_path, "many", "--data-folder", tmp_path / "data")
    assert process.returncode == 0, process.stderr
    texts = {text for file in read(tmp_path / "data").values() for text in file}
    assert {text for text in texts if "many?\nA: many.f" not in text} == {
        "Q: What is one.new in many?\nA: many.one.new A new one.",
        "Q: What is two.new in many?\nA: many.two.new A new two.",
        "Q: What is one.Thing.run in many?\nA: many.one.Thing.run Run one.",
        "Q: What is two.Thing.run in many?\nA: many.two.Thing.run Run two.",
        "Q: What is once in many?\nA: many.only.once Once.",
    }


def test_near_copies_stay_in_one_file(tmp_path):
    """As LAPACK's s, d, c and z, and other texts that share a few lines with them."""
    solvers = ""
    for i in range(40):
        text = " ".join(f"step{i}of{j}" for j in range(14))
        for kind in "sdcz":
            docstring = (
                f"{kind}solve{i} of {kind} numbers: {text}, in place where overwrite is set."
            )
            solvers += f"def {kind}solve{i}():\n    {docstring!r}\n\n"
    make_package(tmp_path, "lapack", __init__=solvers)
    process = run(tmp_path, "lapack", "--data-folder", tmp_path / "data")
    assert process.returncode == 0, process.stderr
    kinds = {}
    for name, texts in read(tmp_path / "data").items():
        assert len(texts) >= 12
        for text in texts:
            number = re.search(r"solve(\d+) in", text)[1]
            kinds.setdefault(number, set()).add(name)
    assert len(kinds) == 40
    assert all(len(files) == 1 for files in kinds.values())


def test_a_loop_in_compiled_code_costs_its_module_alone(tmp_path, monkeypatch, capfd):
    endless = "import itertools, collections\ncollections.deque(itertools.count(), maxlen=0)"
    make_package(tmp_path, "stuck", endless=endless, good=documented_functions(5))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dataset, "MODULE_SECONDS", 2)
    monkeypatch.setattr(dataset, "GRACE_SECONDS", 1)
    dataset.create_dataset(["stuck"], tmp_path / "data", processes=1, tokenizer=None)
    assert "skipped stuck.endless: it took longer than 2 s\n" in capfd.readouterr()[0]
    assert sum(map(len, read(tmp_path / "data").values())) == 5


HALF_A_MESSAGE = """
import os
for pipe in range(3, 1 + max(map(int, os.listdir("/dev/fd")))):
    try:
        os.write(pipe, b"\\0\\0\\1\\0 256 bytes, it says, follow")
    except OSError:
        pass
os._exit(7)
"""


def test_a_process_that_ends_amid_a_message_costs_its_package_alone(tmp_path):
    make_package(tmp_path, "ends", __init__=HALF_A_MESSAGE)
    process = run(tmp_path, "ends", "json", "--data-folder", tmp_path / "data")
    assert process.returncode == 1
    assert "no records of ends: it exited with 7" in process.stderr
    assert sum(map(len, read(tmp_path / "data").values())) > 5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: os.mkfifo(folder / "train.jsonl"), "train.jsonl is no file: move it"),
        (lambda folder: os.symlink("nowhere", folder / "test.jsonl"), "test.jsonl is no file"),
        (lambda folder: os.symlink("nowhere", folder / "data"), "data is a file: name a folder"),
        (lambda folder: (folder / "data").touch(), "data is a file: name a folder"),
    ],
)
def test_a_folder_that_cannot_be_written_is_one_line_at_once(tmp_path, make, says):
    make(tmp_path)
    folder = tmp_path / "data" / "deep" if os.path.lexists(tmp_path / "data") else tmp_path
    process = run(tmp_path, "json", "--data-folder", folder, "--overwrite")
    assert process.returncode == 2
    if "data is" in says:
        says = "is a file: name a folder"
    assert says in process.stderr
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["./json", "", "a-b.c"])
def test_what_is_no_name_of_a_package_is_said(tmp_path, name):
    process = run(tmp_path, name, "--data-folder", tmp_path / "data")
    assert process.returncode == 2
    assert "it is no name of a package: give the name that an import has" in process.stderr


def test_chats_hold_the_same_texts_and_may_replace_them(mlx_data, tmp_path):
    """They are this script's, of the same package."""
    for name in dataset.DATASET:
        shutil.copy(mlx_data / name, tmp_path / name)
    process = run_script(
        "cwk_create_dataset.py", "mlx", "--data-folder", tmp_path, "--format", "chat"
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count(", the longest ") == 3
    for name, texts in read(mlx_data).items():
        records = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        roles, said = zip(
            *(zip(*(message.values() for message in r["messages"]), strict=True) for r in records),
            strict=True,
        )
        assert set(roles) == {("user", "assistant")}
        assert [f"Q: {question}\nA: {answer}" for question, answer in said] == texts
        assert len(list(lora.Dataset(tmp_path / name))) == len(texts)


@pytest.mark.parametrize("form", dataset.FORMATS)
def test_a_record_of_each_format_has_the_text_of_the_others(tmp_path, form):
    question, answer = "Q: What is a in b?\nA: ", "b.a  Does\nA: it. "
    record = dataset.to_record(question, answer, form)
    assert dataset.to_text(record) == question + answer
    (tmp_path / "train.jsonl").write_text(json.dumps(record))
    assert dataset.packages_in(tmp_path / "train.jsonl") == {"b"}
    if form == "completion":
        assert record == {"prompt": "Q: What is a in b?\nA:", "completion": " " + answer}
