"""Who may import whom. The table is the architecture: arrows go one way, and nothing imports what it does not list."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ldm_lab"

# The leaves: torch (and the standard library) alone. All of the house may import `errors`.
LEAVES = {
    "version", "randomness", "serialization", "images", "sweep", "lengths", "settings", "config_files", "errors",
    "notices", "untrusted", "saving", "compiled", "records", "card", "tracking", "threads", "float32", "transfer",
    "configurable", "weights", "hub", "memory", "outputs",
    "terminal", "signatures",
    "locks",
    "state_dicts",
    "typed", "kinds", "config_keys", "overrides", "nested", "signals", "arguments",
}  # fmt: skip

# Room -> rooms it may import, beside itself and the leaves.
ROOMS = {
    "nn": set(),
    "diffusion": set(),
    "models": {"nn", "interop", "checkpoint"},
    "losses": {"models", "nn"},
    "metrics": {"data", "checkpoint"},  # of an extractor's own images, and what stands for its weights
    "data": {"models"},
    "interop": {"diffusion"},  # plain data in and out: it builds no network
    "checkpoint": {"interop"},
    "parts": {"checkpoint"},
    "states": {"checkpoint"},
    "pipeline": {"models", "diffusion", "interop", "checkpoint", "parts", "states", "denoising"},
    "denoising": {"diffusion"},
    "sampling": {"pipeline", "diffusion", "checkpoint", "states"},
    "pictures": {"pipeline", "denoising", "models", "diffusion", "data"},
    "training": {
        "pipeline", "models", "losses", "data", "diffusion", "metrics", "checkpoint", "states", "denoising",
        "diagnosis", "nn",
    },
    "config": {"building"},
    "building": set(),
    "stages": {"config", "training", "models", "data", "checkpoint"},
    # It builds what training builds, of the same configs, or it would measure something else.
    "benchmark": {"config", "stages", "training", "pipeline", "data", "nn"},
    "evaluation": {
        "sampling", "states", "pipeline", "checkpoint", "diffusion", "models", "losses", "data", "metrics",
        "training",  # the trainer, and in which precision: as `sample.py` has them
    },
    "commands": {
        "pipeline", "models", "losses", "data", "diffusion", "metrics", "interop", "checkpoint", "states", "sampling",
        "benchmark", "report", "diagnosis", "evaluation", "dashboard",
    },
    "report": {"training"},
    "dashboard": set(),
    "diagnosis": {"diffusion"},
    "__main__": {"commands"},
    "__init__": set(),
}  # fmt: skip
LEAF_EDGES = {
    "serialization": {"configurable", "hub", "state_dicts", "typed", "untrusted", "weights"},
    "saving": {"untrusted"}, "images": {"saving"}, "state_dicts": {"untrusted"},
    "configurable": {"hub", "notices", "saving", "typed", "untrusted", "version"},
    "hub": {"typed", "untrusted", "weights"},
    "weights": {"notices", "saving", "untrusted"}, "memory": {"notices"},
    "config_files": {"sweep"}, "records": {"typed", "untrusted", "version"}, "untrusted": {"version"},
    "locks": {"notices", "untrusted"}, "sweep": {"typed"}, "settings": {"nested", "signatures", "typed"},
    "kinds": {"nested", "settings", "signatures"}, "errors": {"signals"}, "arguments": {"untrusted"},
    "config_keys": {"config_files", "nested", "settings"}, "overrides": {"config_files", "typed"},
    "card": {"nested", "records", "saving", "untrusted", "version"},
    "tracking": {"records", "saving", "untrusted"},
}  # fmt: skip

# Libraries that only some may import.
LIGHTNING = {"training", "data.datamodule", "sampling", "evaluation"}
HYDRA = {"config", "building", "overrides"}


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
    assert own in ROOMS or own in LEAVES, f"{own} is not in the table: say what it may import"
    allowed = (LEAF_EDGES.get(own, set()) if own in LEAVES else ROOMS[own] | LEAVES) | {"errors", "signals"}
    for target in imports(modules()[name]):
        if target.startswith("ldm_lab."):
            other = room(target.removeprefix("ldm_lab."))
            assert other == own or other in allowed, (
                f"{name} imports {target}, but {own} may import only {sorted(allowed)}"
            )


@pytest.mark.parametrize("name", sorted(modules()))
def test_frameworks_stay_in_their_rooms(name):
    libraries = {target.split(".")[0] for target in imports(modules()[name])}
    if room(name) not in LIGHTNING and name not in LIGHTNING:
        assert not libraries & {"lightning", "pytorch_lightning"}, f"{name} imports lightning"
    if name not in HYDRA:
        assert not libraries & {"hydra", "omegaconf"}, f"{name} imports hydra or omegaconf"


@pytest.mark.parametrize("folder", ["nn", "diffusion"])
def test_the_mathematics_is_pure(folder):
    for name, path in modules().items():
        if room(name) == folder:
            outside = {target.split(".")[0] for target in imports(path)} - {"ldm_lab"}
            third_party = {library for library in outside if library not in __import__("sys").stdlib_module_names}
            assert third_party <= {"torch", "typing_extensions"}, f"{name} imports {third_party}"


def test_importing_the_package_is_cheap():
    import subprocess
    import sys

    code = "import sys, ldm_lab; print('torch' in sys.modules, ldm_lab.__version__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.split()[0] == "False"
