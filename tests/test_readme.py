"""What the pages of the project say is so: links, commands, files, and messages."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
PAGES = ["README.md", "base-model/README.md", "tests/benchmarks/README.md"]
SCRIPTS = ["convert.py", "lora.py", "fuse.py", "cwk_create_dataset.py"]
FLAG = r"(?<![\w-])--?[a-z][\w-]*"
FOREIGN_FLAGS = {"--help", "-p", "-n", "--over", "-m", "--enable-lora", "--lora-modules"}  # others'
MLX_MESSAGES = ("[METAL]", "cudaMallocAsync", "Impacting")


def without_blocks(text: str) -> str:
    """A page without its blocks of code, which hold brackets of their own."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def literals(file: Path) -> list[str]:
    """The texts in a source file; a text with values in it is in pieces."""
    nodes = ast.walk(ast.parse(file.read_text("utf-8")))
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def flags(script: str) -> set[str]:
    """The flags that a script defines, those of lora.py in parts/flags.py too."""
    files = [ROOT / script, *([ROOT / "parts" / "flags.py"] if script == "lora.py" else [])]
    return {text for file in files for text in literals(file) if re.fullmatch(FLAG, text)}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_is_there(page):
    links = re.findall(r"\]\(([^)]+)\)", without_blocks((ROOT / page).read_text("utf-8")))
    links = [link for link in links if "://" not in link]
    assert len(links) >= {"README.md": 6, "tests/benchmarks/README.md": 10}.get(page, 0)
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tracked = known.stdout.splitlines()
    for link in links:
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        assert not tracked or str(target.relative_to(ROOT)) in tracked, link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_exist_with_their_flags(page):
    text = (ROOT / page).read_text("utf-8").replace("\\\n", " ")
    commands = re.findall(r"\bpython ([\w/-]+\.py)([^\n`]*)", text)
    assert len(commands) >= {"README.md": 12, "tests/benchmarks/README.md": 15}.get(page, 1)
    for script, arguments in commands:
        assert set(re.findall(FLAG, arguments)) <= flags(script), (script, arguments)


def test_the_readme_names_no_flag_that_the_scripts_lack():
    spans = re.findall(r"`(--?[a-z][^`]*)`", without_blocks(README))
    named = {flag for span in spans for flag in re.findall(FLAG, span)}
    assert len(named) >= 15
    assert named - FOREIGN_FLAGS - set().union(*map(flags, SCRIPTS)) == set()


def test_every_script_has_its_place_in_the_readme():
    tree = re.search(r"## The files\n\n```\n(.*?)```", README, re.DOTALL)[1]
    for script in [*ROOT.glob("*.py"), *ROOT.glob("*.sh")]:
        assert re.search(rf"(?<!\w){script.name}", tree), script.name


def test_the_messages_of_the_troubleshooting_are_those_of_the_suite():
    rows = re.findall(r"^\| (`.*?) \| ", README.partition("## Troubleshooting")[2], re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    messages = [message for message in messages if not message.startswith(MLX_MESSAGES)]
    assert len(messages) >= 15
    sources = [*ROOT.glob("*.py"), *ROOT.glob("parts/*.py")]
    texts = "\n".join(text for source in sources for text in literals(source))
    for message in messages:
        # Between the pieces stand what the message fills in: names of files, numbers.
        for piece in re.split(r"\.\.\.|\S*\d\S*|\bN\b|\S+\.(?:npz|jsonl|json|py)\b", message):
            assert piece.strip(" ,:") in texts, message
