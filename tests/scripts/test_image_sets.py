import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "image_sets.sh"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a script of bash")


def run(*arguments, path):
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, env={"PATH": path})


@pytest.fixture
def programs(tmp_path):
    """A PATH with stand-ins for the programs that fetch packages."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("npm", "apt-get", "dpkg-deb", "python"):
        (folder / name).write_text("#!/bin/sh\nexit 1\n")
        (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_the_folder_must_be_named(programs):
    result = run(path=programs)
    assert result.returncode == 1
    assert "name the folder" in result.stderr


def test_an_existing_set_is_left_alone(programs, tmp_path):
    kept = tmp_path / "sets" / "emoji" / "own.png"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    result = run(tmp_path / "sets", path=programs)
    assert result.returncode == 1
    assert "is there already" in result.stderr
    assert kept.read_text() == "mine"


def test_a_failed_download_leaves_nothing(programs, tmp_path):
    result = run(tmp_path / "sets", path=programs)
    assert result.returncode == 1
    assert not list((tmp_path / "sets").iterdir())
