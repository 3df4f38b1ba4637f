"""The requirements can be met on what the README names, and the scripts run on what they allow."""

import ast
import json
import re
import subprocess
import sys
import zipfile
from itertools import product
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

SCRIPTS = ["convert.py", "lora.py", "fuse.py", "cwk_create_dataset.py", "base-model/make.py"]
FILES = ["requirements.txt", "requirements-cuda.txt"]
# Some of what a glibc of 2.35 takes, as pip is slow with all: the tags that the wheels have.
MANYLINUX = ["manylinux2014", *(f"manylinux_2_{n}" for n in (17, 28, 31, 35))]
PLATFORMS = {  # what pip calls them, and what markers do
    "macOS 14, Apple silicon": (["macosx_14_0_arm64"], ("darwin", "arm64")),
    "Linux x86-64": ([f"{tag}_x86_64" for tag in MANYLINUX], ("linux", "x86_64")),
    "Linux arm64": ([f"{tag}_aarch64" for tag in MANYLINUX], ("linux", "aarch64")),
}
EXTRAS = {"mlx[cpu]": "mlx-cpu", "mlx[cuda13]": "mlx-cuda-13", "mlx": "mlx-metal"}
# Of these, one version is asked for, which has a wheel for each Python. The others' versions or
# wheels are for any, and the newest Python is the one that may lack them.
PER_PYTHON = {"mlx", "sentencepiece", "torch"}

# pip reads an index, as it does for `python -m pip index versions ...`, but starts once for all,
# reads and parses a page once, and does not look each time for what is installed here.
ASK_PIP = """
import contextlib, functools, io, json, runpy, sys
from pip._internal.commands import index
from pip._internal.index import collector
from pip._internal.network import session
read, pages = collector._get_index_content, {}
def read_once(link, **options):
    if link.url not in pages:
        pages[link.url] = page = read(link, **options)
        if page:
            page.cache_link_parsing = True
    return pages[link.url]
collector._get_index_content = read_once
session.user_agent = functools.cache(session.user_agent)
index.print_dist_installation_info = lambda *_, **__: None
answers = []
for arguments in json.load(sys.stdin):
    sys.argv = ["pip", "index", "versions", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        runpy.run_module("pip", run_name="__main__", alter_sys=True)
    answers.append(output.getvalue())
json.dump(answers, sys.stdout)
"""


def pythons() -> list[str]:
    """The Pythons that the README names."""
    first, last = re.search(
        r"Python 3\.(\d+) to 3\.(\d+)", (ROOT / "README.md").read_text()
    ).groups()
    return [f"3.{minor}" for minor in range(int(first), int(last) + 1)]


def requirements(file: str, python: str, platform: str) -> list[Requirement]:
    """The requirements of a file that count there, and those that MLX has there."""
    system, machine = PLATFORMS[platform][1]
    environment = {"python_version": python, "sys_platform": system, "platform_machine": machine}
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    found = [r for r in found if r.marker is None or r.marker.evaluate(environment)]
    (mlx,) = (r for r in found if r.name == "mlx")
    name = EXTRAS[mlx.name + "".join(f"[{extra}]" for extra in mlx.extras)]
    return [*found, Requirement(f"{name}{mlx.specifier}")]


@pytest.fixture(scope="module")
def oldest_mlx(tmp_path_factory) -> Path:
    """The lowest wheel of MLX for macOS that requirements.txt allows."""
    lowest = re.search(r"^mlx>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M)[1]
    folder = tmp_path_factory.mktemp("mlx")
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=0"]
        + ["--platform=macosx_14_0_arm64", "--python-version=3.10", "--dest", folder]
        + [f"mlx=={lowest}"],
        capture_output=True,
        text=True,
    )
    if "from versions: none" in pip.stderr:
        pytest.skip("pip reaches no index")
    assert pip.returncode == 0, pip.stderr
    return next(folder.glob("*.whl"))


def names_of(wheel: zipfile.ZipFile, module: str) -> set[str]:
    """The names that a module of MLX has, by its stubs or its sources."""
    path = module.replace(".", "/")
    names = set()
    for file in wheel.namelist():
        if re.fullmatch(rf"{path}(\.pyi?|/__init__\.pyi|/.*\.py)", file):
            names.add(Path(file).stem)
            for node in ast.walk(ast.parse(wheel.read(file))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    names.add(node.name)
                elif isinstance(node, ast.alias):
                    names.add(node.asname or node.name)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    names.add(node.id)
    return names


def mlx_names(file: Path) -> set[tuple[str, str]]:
    """Each module of MLX and the name of it that a source file uses."""
    tree = ast.parse(file.read_text())
    modules, used = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx."):
            used |= {(node.module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            module, _, name = ast.unparse(node).rpartition(".")
            alias, dot, rest = module.partition(".")
            if modules.get(alias, "").startswith("mlx.") and rest in ("", *SUBMODULES):
                used.add((f"{modules[alias]}{dot}{rest}", name))
    return used


SUBMODULES = ("fast", "random", "linalg", "cuda", "metal", "distributed", "losses", "init", "utils")


@pytest.mark.index
def test_the_lowest_mlx_for_macos_has_every_name_that_the_suite_uses(oldest_mlx):
    sources = [*ROOT.glob("*.py"), *ROOT.glob("parts/*.py"), *ROOT.glob("base-model/*.py")]
    used = set().union(*map(mlx_names, sources))
    assert {("mlx.core.fast", "rope"), ("mlx.nn", "Linear"), ("mlx.utils", "tree_map")} <= used
    with zipfile.ZipFile(oldest_mlx) as wheel:
        names = {module: names_of(wheel, module) for module, _ in used}
    assert {f"{module}.{name}" for module, name in used if name not in names[module]} == set()


@pytest.mark.index
def test_the_index_has_wheels_for_every_python_and_platform_that_the_readme_names(oldest_mlx):
    """As `pip install` sees it, without its downloads of some gigabytes."""

    asked = {}
    for platform, python, file in product(PLATFORMS, pythons(), FILES):
        if file == "requirements.txt" or "Linux" in platform:
            for requirement in requirements(file, python, platform):
                if requirement.name in PER_PYTHON or python == pythons()[-1]:
                    asked.setdefault((requirement.name, python, platform), set()).add(requirement)
    calls = [
        [name, "--only-binary=:all:", f"--python-version={python}"]
        + [f"--platform={tag}" for tag in PLATFORMS[platform][0]]
        for name, python, platform in asked
    ]
    pip = subprocess.run(
        [sys.executable, "-c", ASK_PIP], input=json.dumps(calls), capture_output=True, text=True
    )
    assert pip.returncode == 0, pip.stderr
    missing = []
    for (key, wanted), answer in zip(asked.items(), json.loads(pip.stdout), strict=True):
        line = re.search(r"^Available versions: (.*)", answer, re.M)
        versions = line[1].split(", ") if line else []
        _, python, platform = key
        missing += [
            f"{requirement} for Python {python} on {platform}"
            for requirement in wanted
            if not any(requirement.specifier.filter(versions))
        ]
    assert missing == []


@pytest.mark.parametrize("script", ["lora", "cwk_create_dataset"])
def test_torch_is_for_convert_alone(script):
    code = f"import sys, {script}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# -------------------------------------------------------------------------------------------------
# Pythons that are too old


def old_pythons() -> list[str]:
    """Those of this machine, where pyenv keeps some."""
    found = Path.home().glob(".pyenv/versions/3.[6-9].*/bin/python")
    return sorted(map(str, found))


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_old_python_can_read_what_a_script_begins_with(script):
    """Its own syntax, and all that it has imported when it is told to stop."""
    for file in (script, "parts/__init__.py", "parts/python_version.py"):
        ast.parse((ROOT / file).read_text(), feature_version=(3, 6))
    imports = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.parse((ROOT / script).read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert set(imports[: imports.index("parts")]) <= {"sys", "os.path"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_that_is_too_old_is_one_line(script):
    if not old_pythons():
        pytest.skip("there is no old Python here")
    for python in old_pythons():
        process = subprocess.run([python, ROOT / script], capture_output=True, encoding="utf-8")
        assert process.returncode == 2
        assert re.fullmatch(
            rf"{Path(script).name}: error: this is Python 3\.[6-9], and 3\.10 or newer is needed: "
            r"start the script with one\n",
            process.stderr,
        )
