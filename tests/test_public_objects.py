"""Which objects of a package have a record, and under which name: small packages, one of a kind."""

import contextlib
import json

import pytest
from conftest import run_script

from parts.foreign import TookTooLong, time_limit
from parts.package_modules import names_of_distribution, namespaces

FILLER = "".join(f'def fill{i}():\n    "Filler number {i}."\n' for i in range(9))

# Files of a package, and the dotted names, without the package's own, that have a record.
CASES = {
    "hidden": (  # a function hides the module of its name
        {
            "__init__.py": "from .solve import solve",
            "solve.py": 'def solve():\n    "Solve."\n'
            'class Solver:\n    def run(self):\n        "Run."',
        },
        {"solve", "solve.Solver.run"},
    ),
    "imports": (  # a module has its own name, not that of another's import; a class, its methods
        {
            "__init__.py": "from . import functional, nn\nfrom ._tensor import Half, Tensor",
            "functional.py": "from .nn import functional as F",
            "nn/__init__.py": "from . import functional",
            "nn/functional.py": 'def relu():\n    "Relu."',
            "_tensor.py": 'class Tensor:\n    def backward(self):\n        "Back."\n'
            'Half = type("Half", (), {"__module__": "imports", "backward": Tensor.backward})',
        },
        {"nn.functional.relu", "Tensor.backward"},
    ),
    "inherits": (  # what a class has from a base where no user meets it
        {
            "__init__.py": "from .frames import Frame, Series\nfrom .shown import Base, Sub\n"
            "class _Mixin:\n"
            '    def fit(self):\n        "Fit."\n    def score(self):\n        "Score."\n'
            "class Model(_Mixin):\n    def score(self):\n        pass\n"
            "class ModelTwo(_Mixin):\n    pass",
            "frames.py": 'class NDFrame:\n    def abs(self):\n        "Abs."\n'
            "class Frame(NDFrame):\n    pass\nclass Series(NDFrame):\n    pass",
            "shown.py": 'class Base:\n    def update(self):\n        "Update."\n'
            "class Sub(Base):\n    pass",
        },
        {"Model.fit", "ModelTwo.score", "Frame.abs", "Base.update"},
    ),
    "described": (  # descriptors of every kind
        {
            "__init__.py": """
import functools
class available_if:
    def __init__(self, function):
        self.__doc__ = function.__doc__
    def __get__(self, instance, owner=None):
        return self
class Parameter:
    def __init__(self, description):
        self.__doc__ = description
class Graph:
    size = Parameter("The size.")
    count = 5
    @functools.cached_property
    def nodes(self):
        "All nodes."
    @available_if
    def predict(self):
        "Predict."
    @functools.singledispatchmethod
    def add(self, x):
        "Add."
    @property
    def edges(self):
        "All edges."
""",
        },
        {"Graph.size", "Graph.nodes", "Graph.predict", "Graph.add", "Graph.edges"},
    ),
    "aliases": (  # an alias gives way to a path that is one level longer
        {
            "__init__.py": "from .linalg import norm as matrix_norm\nfrom .deep.er import f as g",
            "linalg.py": 'def norm():\n    "Norm."',
            "deep/__init__.py": "",
            "deep/er.py": 'def f():\n    "F."',
        },
        {"linalg.norm", "g"},
    ),
    "bound": (  # a function of an instance, which is a method
        {
            "__init__.py": "from .context import Context\ncontext = Context()\nsin = context.sin",
            "context.py": 'class Context:\n    def sin(self, x):\n        "Sine."',
        },
        {"sin"},
    ),
    "lists": (  # what only `__dir__` lists is made when it is first asked for
        {
            "__init__.py": 'def __dir__():\n    return ["made", "hangs"]\n'
            "def __getattr__(name):\n    import time\n"
            '    if name == "made":\n        import lists._made\n        return lists._made.made\n'
            '    if name == "hangs":\n        time.sleep(1000)\n    raise AttributeError(name)',
            "_made.py": 'def made():\n    "Made."',
        },
        {"made"},
    ),
    "spaces": (  # namespace packages below namespace packages
        {
            "cloud/storage/__init__.py": 'def get():\n    "Get."',
            "one.py": 'def first():\n    "First."',
            "data/numbers.txt": "1 2 3",
        },
        {"cloud.storage.get", "one.first"},
    ),
    "circular": (  # a `__path__` that leads back to where it came from
        {
            "__init__.py": "",
            "again/__init__.py": 'import os\n__path__ = [os.path.dirname(__path__[0])]\n"Again."',
            "work.py": 'def work():\n    "Work."',
        },
        {"work.work"},
    ),
    "foreign": (  # what is other people's: copied, imported, vendored, or of its type
        {
            "__init__.py": "import collections\nfrom json import dumps\n"
            "from .vendor.six import moved\nfrom ._vendored import *\n"
            "class Bag(dict):\n    copy = dict.copy\n"
            "    def update(self):\n        pass\n    update.__doc__ = dict.update.__doc__\n"
            'Point = collections.namedtuple("Point", "x y")\nNumbers = list[int]\n'
            "class Own:\n    'Own.'\nOwns = list[Own]",
            "vendor/__init__.py": "",
            "vendor/six.py": 'def moved():\n    "Moved."',
            "_vendored.py": "from json import loads",
            "tests/__init__.py": 'def helper():\n    "Helps."',
            "SelfTest/__init__.py": 'def helper():\n    "Helps."',
            "test/__init__.py": "from .client import Client",
            "test/client.py": 'class Client:\n    "A client for the user\'s own tests."',
        },
        {"Own", "test.Client"},
    ),
    "lies": (  # names, docstrings and dictionaries that are none, or fail when they are compared
        {
            "__init__.py": """
class Failing:
    def __eq__(self, other):
        raise ValueError
    __str__ = __hash__ = None
class Text(str):
    __eq__ = Failing.__eq__
    __hash__ = str.__hash__
    def strip(self):
        return 5
class Meta(type):
    __dict__ = property(lambda cls: {"told": 5})
    __name__ = property(lambda cls: Failing())
class Liar(metaclass=Meta):
    "Liar."
    def told(self):
        "Told."
class Untold:
    __doc__ = Failing()
    def told(self):
        "Told too."
def lazy():
    pass
lazy.__doc__ = Text("Lazy.")
def loud():
    "Loud."
__all__ = [Text("loud"), 1, None]
for name in ("half \\udc80", "a b", "x.y", "", 5):
    globals()[name] = lambda: None
    globals()[name].__doc__ = f"Odd {name}."
""",
        },
        {"Liar", "Liar.told", "Untold.told", "lazy", "loud"},
    ),
    "crashes": (  # what ends the process when it is asked for costs itself alone
        {
            "__init__.py": '__all__ = ["ends"]\ndef __getattr__(name):\n    import os\n'
            '    if name == "ends":\n        os._exit(0)\n    raise AttributeError(name)',
            "whole.py": 'def fine():\n    "Fine."',
        },
        {"whole.fine"},
    ),
    "endless": (  # modules that make modules
        {
            "__init__.py": "import types\nclass Tree(types.ModuleType):\n"
            '    __all__ = ["tree"]\n    def __init__(self, name):\n'
            '        super().__init__(name)\n        self.__all__ = ["tree"]\n'
            "    def __getattr__(self, name):\n"
            '        return Tree(f"{self.__name__}.{name}")\n'
            'tree = Tree("endless.tree")\ndef ends():\n    "Ends."',
        },
        {"ends"},
    ),
    "rude": (  # a process that is no longer as it was
        {
            "__init__.py": "import signal, sys\nsys.path.insert(0, 5)\ndel signal.setitimer\n"
            "sys.modules[None] = None\n__path__ = __path__[0]\n"
            'def works():\n    "Works."',
        },
        {"works"},
    ),
    "mute": (  # an error that cannot be said, and a file that no import statement names
        {
            "__init__.py": "",
            "bad.py": "class Bad(Exception):\n    def __str__(self):\n        raise self\n"
            "raise Bad",
            "a-script.py": 'def run():\n    "Run."',
            "good.py": 'def good():\n    "Good."',
        },
        {"good.good"},
    ),
    "facade": (  # the root's `__all__` gives what another package made
        {
            "__init__.py": "from facade_core import fixture, helper\n"
            'from collections import OrderedDict\n__all__ = ["fixture", "OrderedDict"]',
        },
        {"fixture"},
    ),
    "facade_core": (
        {"__init__.py": 'def fixture():\n    "Fixture."\ndef helper():\n    "Helper."'},
        {"fixture", "helper"},
    ),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, dict[str, str]]:
    """What one run of the script on all cases recorded: package, dotted name, docstring."""
    folder = tmp_path_factory.mktemp("cases")
    for package, (files, _) in CASES.items():
        for name, source in files.items():
            path = folder / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
    (folder / "filler.py").write_text(FILLER)
    process = run_script(
        "cwk_create_dataset.py", *CASES, "filler", "--data-folder", folder / "data",
        PYTHONPATH=str(folder),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    found = {package: {} for package in [*CASES, "filler"]}
    for path in (folder / "data").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            dotted_name, docstring = json.loads(line)["text"].split("\nA: ")[1].split(" ", 1)
            found[dotted_name.partition(".")[0]][dotted_name.partition(".")[2]] = docstring
    return found


@pytest.mark.parametrize("package", CASES)
def test_each_object_has_one_record_under_the_name_that_a_user_types(records, package):
    assert records[package].keys() - {""} == CASES[package][1]


def test_code_that_survives_an_interruption_is_interrupted_again():
    def loop_twice() -> None:
        with contextlib.suppress(TookTooLong):
            while True:
                pass
        while True:
            pass

    with pytest.raises(TookTooLong), time_limit(0.1):
        loop_twice()


@pytest.mark.parametrize(("distribution", "names"), [("PyYAML", ["yaml"]), ("no-such-thing", [])])
def test_a_distribution_tells_what_it_is_imported_as(distribution, names):
    assert names_of_distribution(distribution) == names


def test_links_that_lead_back_hold_no_packages(tmp_path):
    inner = tmp_path / "space" / "inner"
    inner.mkdir(parents=True)
    (inner / "part.py").touch()
    aside = tmp_path / "aside"
    aside.mkdir()
    (tmp_path / "module.py").touch()
    for i in range(9):
        (inner.parent / f"up{i}").symlink_to("..")
        (inner.parent / f"aside{i}").symlink_to(aside)
        (aside / f"back{i}").symlink_to(inner.parent)
    assert namespaces(inner.parent) == {"inner"}


def test_an_editable_package_below_a_namespace_has_records(tmp_path):
    """As setuptools and others install it: a .pth file that adds the folder of the sources."""
    sources = tmp_path / "sources" / "shared_space" / "part"
    sources.mkdir(parents=True)
    (sources / "__init__.py").write_text(FILLER)
    installed = tmp_path / "installed"
    (installed / "shared_space" / "other").mkdir(parents=True)
    (installed / "shared_space" / "other" / "__init__.py").write_text('"""The other."""')
    (installed / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({str(sources.parents[1])!r})"
    )
    process = run_script(
        "cwk_create_dataset.py", "shared_space", "--data-folder", tmp_path / "data",
        PYTHONPATH=str(installed),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = [line for path in (tmp_path / "data").glob("*.jsonl") for line in path.open()]
    assert sum("A: shared_space.part.fill" in line for line in lines) == 9
    assert sum("A: shared_space.other The other." in line for line in lines) == 1
