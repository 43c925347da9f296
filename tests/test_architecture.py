"""Who may import whom. The table is the architecture: arrows go one way, and nothing imports what it does not list."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from ldm_lab.utils import moved
from ldm_lab.utils.moved import MOVED

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ldm_lab"

# Room -> rooms that it may import. From top to bottom: nothing imports what stands above it.
ROOMS = {
    "__main__": {"tools", "utils"},
    "tools": {
        "config", "training", "sampling", "runs", "metrics", "pipeline", "losses", "checkpoints", "data", "models",
        "diffusion", "utils",
    },
    "config": {
        "training", "sampling", "runs", "pipeline", "data", "models", "checkpoints", "diffusion", "utils",
    },
    "training": {
        "sampling", "runs", "metrics", "pipeline", "losses", "checkpoints", "data", "models", "diffusion", "utils",
    },
    "sampling": {"pipeline", "checkpoints", "data", "models", "diffusion", "utils"},
    "runs": {"checkpoints", "diffusion", "utils"},
    "metrics": {"checkpoints", "data", "utils"},
    "pipeline": {"models", "checkpoints", "diffusion", "utils"},
    "losses": {"models", "utils"},
    "data": {"utils"},
    "models": {"checkpoints", "utils"},  # `from_pretrained` and `from_single_file` read files
    "checkpoints": {"diffusion", "utils"},
    "diffusion": {"utils"},
    "__init__": {"utils"},
    "utils": set(),
}  # fmt: skip

# Libraries that only some may import.
LIGHTNING = {"training", "config.sampling", "data.datamodule", "sampling.generate", "tools.evaluate"}
HYDRA = {"config"}


def modules():
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")
    }


def imports(path):
    """Dotted names imported anywhere in a file, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module):
    return module.split(".")[0]


@pytest.mark.parametrize("name", sorted(modules()))
def test_arrows_go_one_way(name):
    own = room(name)
    assert own in ROOMS, f"{own} is not in the table: say what it may import"
    allowed = ROOMS[own]
    for target in imports(modules()[name]):
        if target.startswith("ldm_lab."):
            other = room(target.removeprefix("ldm_lab."))
            assert other == own or other in allowed, (
                f"{name} imports {target}, but {own} may import only {sorted(allowed)}"
            )


def test_the_table_is_read_from_top_to_bottom():
    rooms = list(ROOMS)
    for place, (own, below) in enumerate(ROOMS.items()):
        assert below <= set(rooms[place + 1 :]), f"{own} may import what stands above it"


@pytest.mark.parametrize("name", sorted(modules()))
def test_frameworks_stay_in_their_rooms(name):
    libraries = {target.split(".")[0] for target in imports(modules()[name])}
    if not any(f"{name}.".startswith(f"{place}.") for place in LIGHTNING):
        assert not libraries & {"lightning", "pytorch_lightning"}, f"{name} imports lightning"
    if room(name) not in HYDRA:
        assert not libraries & {"hydra", "omegaconf"}, f"{name} imports hydra or omegaconf"


@pytest.mark.parametrize("folder", ["models.layers", "diffusion"])
def test_the_mathematics_is_pure(folder):
    for name, path in modules().items():
        if name.startswith(f"{folder}."):
            outside = {target.split(".")[0] for target in imports(path)} - {"ldm_lab"}
            third_party = {library for library in outside if library not in __import__("sys").stdlib_module_names}
            assert third_party <= {"torch", "typing_extensions"}, f"{name} imports {third_party}"


def named_paths(page):
    """The files and folders of this repository that a page names in backquotes."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|md|toml))[`:]", text)


@pytest.mark.parametrize("page", [f"docs/{name}.md" for name in ("architecture", "reliability", "performance")])
def test_pages_name_paths_that_are_there(page):
    rooms = [path for path in PACKAGE.iterdir() if path.is_dir()]
    homes = (ROOT, PACKAGE, ROOT / "tests", PACKAGE / "tools/evaluate", *rooms)
    elsewhere = ("lightning/", "runs/x", "gpu_check.", "eval/")
    found = [path for path in named_paths(page) if not path.startswith(elsewhere) and "NAME" not in path]
    assert found
    assert [path for path in found if not any((home / path).exists() for home in homes)] == []


def test_the_page_has_a_row_for_each_room():
    rows = set(re.findall(r"^\| `ldm_lab/(\w+)", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.M))
    assert rows >= set(ROOMS) - {"__init__", "__main__"}


@pytest.mark.parametrize(("old", "new"), sorted(MOVED.items()))
def test_moved_modules_are_imported_by_their_old_names(old, new):
    spec = importlib.util.find_spec(f"ldm_lab.{new}")
    assert spec is not None
    assert moved.current(f"ldm_lab.{old}.Name") == f"ldm_lab.{new}.Name"
    assert importlib.import_module(f"ldm_lab.{old}") is importlib.import_module(f"ldm_lab.{new}")


def test_names_that_have_not_moved_stay():
    for name in (
        "ldm_lab.models.unet.UNet2DModel",
        "torch.nn.Linear",
        "my_pkg.errors.Mine",
        "ldm_lab.training.ema.EMA",
    ):
        assert moved.current(name) == name
    assert moved.current("ldm_lab.interop.compvis.read") == "ldm_lab.checkpoints.compvis.read"


def test_importing_the_package_is_cheap():
    import subprocess
    import sys

    code = "import sys, ldm_lab; print('torch' in sys.modules, ldm_lab.__version__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.split()[0] == "False"
