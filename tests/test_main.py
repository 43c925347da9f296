"""`python -m ldm_lab`: the list of the small tools, running one, and how one fails."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ldm_lab import __main__ as program
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.reading import LoadError

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "ldm_lab/tools"
TOOLS = sorted(path.stem for path in [*HOME.glob("[!_]*.py"), *(p.parent for p in HOME.glob("*/__init__.py"))])


@pytest.fixture
def tool(monkeypatch):
    """Puts a function in the place of the tool `samplers`."""

    def install(main):
        monkeypatch.setattr(program.importlib, "import_module", lambda name: SimpleNamespace(main=main))

    return install


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_list_names_every_tool_in_a_line(argv, capsys):
    program.main(argv)
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == TOOLS
    assert all(len(line) <= 120 and len(line.split()) > 3 for line in lines)


def test_listing_is_cheap():
    code = "import sys; from ldm_lab.__main__ import main; main([]); print({'torch', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_tool_gets_its_arguments(tool):
    got = []
    tool(got.append)
    program.main(["samplers", "runs/x", "--seeds", "2"])
    assert got == [["runs/x", "--seeds", "2"]]


@pytest.mark.parametrize("name", ["sampler", "../samplers", "__init__", ""])
def test_an_unknown_tool_is_named_with_the_list(name, capsys):
    with pytest.raises(SystemExit) as end:
        program.main([name])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {name}: there is no such tool\n{program.listing()}\n"


@pytest.mark.parametrize("error", [UserError("bad"), LoadError("bad"), FileNotFoundError(2, "bad", "x")])
def test_what_a_tool_cannot_do_is_one_line(tool, monkeypatch, error):
    def fail(_):
        raise error

    tool(fail)
    monkeypatch.delenv("LDM_LAB_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        program.main(["samplers"])
    assert end.value.code in ("error: bad", "error: x: bad (while running python -m ldm_lab samplers)")
    monkeypatch.setenv("LDM_LAB_TRACEBACK", "1")
    with pytest.raises(type(error), match="bad"):
        program.main(["samplers"])


@pytest.mark.parametrize("kind", [KeyError, ValueError, OSError])
def test_a_mistake_of_ours_keeps_its_traceback(tool, kind, capsys):
    def fail(_):
        raise kind("ours")

    tool(fail)
    with pytest.raises(kind):
        program.main(["samplers"])
    assert capsys.readouterr().err == f"unexpected {kind.__name__} while running python -m ldm_lab samplers:\n"


def test_an_interrupted_tool_says_so(tool, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    tool(interrupt)
    with pytest.raises(SystemExit) as end:
        program.main(["samplers"])
    assert end.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


def test_the_command_line():
    environment = {key: value for key, value in os.environ.items() if key != "LDM_LAB_TRACEBACK"}
    command = [sys.executable, "-m", "ldm_lab", "samplers", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: nowhere: no such file or folder\n"
