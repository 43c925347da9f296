"""The small tools: `python -m ldm_lab` lists them, `python -m ldm_lab NAME ...` runs one."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

from ldm_lab.utils.errors import reporting
from ldm_lab.utils.shell import at_home
from ldm_lab.utils.terminal import lenient
from ldm_lab.utils.threads import wait_asleep

WRONG_USAGE = 2  # as argparse ends
COMMAND = "*/command.py"  # the entry of a tool that is a folder


def tools() -> dict[str, str]:
    """Name -> what it is for: the first line of each module's docstring. None of them is imported."""
    home = Path(__file__).with_name("tools")
    files = {path.stem: path for path in home.glob("[!_]*.py")} | {
        path.parent.name: path for path in home.glob(COMMAND)
    }
    docstrings = {name: ast.get_docstring(ast.parse(path.read_text("utf-8"))) for name, path in sorted(files.items())}
    return {name: (text or "").partition("\n")[0] for name, text in docstrings.items()}


def listing() -> str:
    """The tools, a line each."""
    known = tools()
    width = max(map(len, known))
    lines = [f"  {name:{width}}  {purpose}" for name, purpose in known.items()]
    return "\n".join(["python -m ldm_lab NAME ...; NAME --help says more", *lines])


def main(argv: list[str]) -> None:
    """Run the tool that `argv` begins with; what it cannot do, it says in one line and ends with status 1."""
    wait_asleep()
    name, *arguments = argv or ["--help"]
    with lenient(), reporting(f"running python -m ldm_lab {name}"):
        if name in ("-h", "--help"):
            print(listing())
        elif name not in tools():
            print(f"error: {name}: there is no such tool\n{listing()}", file=sys.stderr)
            sys.exit(WRONG_USAGE)
        else:
            module = f"ldm_lab.tools.{name}"
            if hasattr(importlib.import_module(module), "__path__"):
                module += ".command"
            importlib.import_module(module).main([at_home(argument) for argument in arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
