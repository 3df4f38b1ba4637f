"""The command line that all scripts share."""

import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from parts import cli


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("a bad\n  value"), 2, "script.py: error: a bad value\n"),
        (FileNotFoundError("no a.npz"), 2, "script.py: error: no a.npz\n"),
        (IsADirectoryError(21, "Is a directory"), 2, "script.py: error: [Errno 21] Is a direc"),
        (PermissionError("not yours"), 1, "script.py: error: not yours\n"),
        (MemoryError(), 1, "script.py: error: MemoryError\n"),
        (RuntimeError("[METAL] it failed"), 1, "script.py: error: [METAL] it failed; wait\n"),
        (FloatingPointError("nan"), 1, "script.py: error: nan\n"),
        (
            ModuleNotFoundError("No module named 'tokenizers'"), 1,
            "script.py: error: No module named 'tokenizers'; pip install -r requirements.txt\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_a_status(error, status, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["some/script.py"])
    with (
        pytest.raises(SystemExit) as exit,
        cli.exit_statuses(lambda error: "wait" if "METAL" in str(error) else None),
    ):
        raise error
    assert exit.value.code == status
    assert capsys.readouterr().err.startswith(line)
    assert line.count("\n") <= 1


def test_ctrl_c_while_a_script_imports_has_no_traceback():
    command = [sys.executable, "-X", "importtime", ROOT / "lora.py", "--help"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        while "numpy._core" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == -signal.SIGINT  # 130 in a shell
    assert "Traceback" not in rest


def test_an_error_of_the_suites_own_keeps_its_traceback():
    with pytest.raises(AssertionError), cli.exit_statuses():
        raise AssertionError


@pytest.mark.parametrize(("ignored", "status"), [("", 129), ("SIGHUP", 0)])
def test_a_signal_ends_a_script_after_its_clean_up_unless_it_is_ignored(ignored, status):
    """`nohup` ignores SIGHUP."""
    script = (
        "import os, signal, sys\nfrom parts import cli\n"
        f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"
        "def run(args):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGHUP)\n"
        "    finally:\n"
        "        print('cleaned up')\n"
        "cli.run(cli.Parser('It runs.'), run)\n"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
    assert process.returncode == status
    assert (process.stdout, process.stderr) == (b"cleaned up\n", b"")


def test_streams_that_are_closed_cost_nothing():
    script = "from parts import cli; cli.run(cli.Parser('It runs.'), lambda args: print('done'))"
    command = f'exec "{sys.executable}" -c "{script}" >&- 2>&-'
    assert subprocess.run(["sh", "-c", command], cwd=ROOT).returncode == 0


def test_a_path_that_exists_is_suggested_for_one_that_does_not(tmp_path):
    (tmp_path / "adapters.npz").touch()
    close = f" (did you mean {tmp_path / 'adapters.npz'}?)"
    assert cli.did_you_mean(tmp_path / "adapter.npz") == close
    assert cli.did_you_mean(tmp_path / "adapters.npz" / "more") == ""
    assert cli.did_you_mean(tmp_path / "weights") == ""
    assert cli.did_you_mean(tmp_path / "adapters.npz") == ""


def test_the_help_shows_each_default_once(capsys):
    parser = cli.Parser("It runs.\n\nFor example so.\n")
    parser.add_argument("--a", default=0, help="a number")
    parser.add_argument("--b", default=4, help="cores (default: all)")
    parser.add_argument("--c", action="store_true", help="a switch")
    shown = parser.format_help()
    assert "a number (default: 0)\n" in shown
    assert "cores (default: all)\n" in shown
    assert shown.count("(default") == 2
    assert shown.endswith("For example so.\n")
