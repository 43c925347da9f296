"""What a run says of the files that it has passed over."""

import numpy as np
import pytest
from PIL import Image

from ldm_lab.data.images import FolderImages
from tests.trained import metrics, train

STAGE = "celebahq/autoencoder"


@pytest.fixture
def broken_images(tmp_path):
    """A folder of 40 images, one broken in each part; returned with the paths of these two."""
    root = tmp_path / "images"
    root.mkdir()
    for n in range(40):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (32, 32, 3), np.uint8)).save(root / f"{n:02}.png")
    broken = [FolderImages(root, split, 32, val_fraction=0.2).path(0) for split in ("train", "val")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    return root, broken


def test_broken_files_are_said_counted_and_listed(broken_images, tmp_path, capsys):
    root, broken = broken_images
    run = [f"experiment={STAGE}", f"data.root={root}", "data.val_fraction=0.2", "data.on_error=skip"]
    train(tmp_path / "runs", *run, "max_images=40")
    folder = tmp_path / "runs" / STAGE
    lines = (folder / "skipped_files.txt").read_text().splitlines()
    assert sorted(line.partition(": ")[0] for line in lines) == sorted(map(str, broken))
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(said) == 2
    assert said[0].startswith("skipped: ")
    assert said[1].startswith("2 file(s) could not be decoded and were skipped")
    counts = [row["data/skipped_files"] for row in metrics(folder).values() if "data/skipped_files" in row]
    assert counts[-1] == 2

    train(tmp_path / "runs", *run, "max_images=48")
    assert (folder / "skipped_files.txt").read_text().splitlines() == lines
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(said) == 1  # what was known is not said again


def test_without_broken_files_there_is_no_list(tmp_path, broken_images, capsys):
    root, broken = broken_images
    for path in broken:
        path.unlink()
    train(tmp_path / "runs", f"experiment={STAGE}", f"data.root={root}", "data.on_error=skip", "max_images=8")
    assert not (tmp_path / "runs" / STAGE / "skipped_files.txt").exists()
    assert "skipped" not in capsys.readouterr().out


def test_a_broken_file_ends_the_run_where_none_may_be_skipped(tmp_path, broken_images):
    root, broken = broken_images
    with pytest.raises(ValueError, match=r"cannot be read: .*; data\.on_error=skip passes over such files$") as error:
        train(tmp_path / "runs", f"experiment={STAGE}", f"data.root={root}")
    assert str(error.value).startswith(tuple(map(str, broken)))
