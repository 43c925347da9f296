"""Who may import whom. The table is the architecture: arrows go one way, and nothing imports what it does not list."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ldm_lab"

# Room -> rooms that it may import. From top to bottom: nothing imports what stands above it.
ROOMS = {
    "__main__": {"tools", "utils"},
    "tools": {
        "config", "training", "sampling", "runs", "metrics", "pipeline", "losses", "checkpoints", "data", "models",
        "diffusion", "utils",
    },
    "config": {"training", "runs", "models", "data", "checkpoints", "utils"},
    "training": {
        "runs", "metrics", "pipeline", "losses", "checkpoints", "data", "models", "diffusion", "utils",
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
    "utils": set(),
    "__init__": {"utils"},
}  # fmt: skip

# Libraries that only some may import.
LIGHTNING = {"training", "data.datamodule", "sampling.generate", "tools.evaluate"}
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
        assert below <= set(rooms[place + 1 :]) | {"utils"}, f"{own} may import what stands above it"


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


def test_importing_the_package_is_cheap():
    import subprocess
    import sys

    code = "import sys, ldm_lab; print('torch' in sys.modules, ldm_lab.__version__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.split()[0] == "False"
