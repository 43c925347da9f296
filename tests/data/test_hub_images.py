"""Data sets of the Hugging Face hub and folders of parquet files."""

import io
import pickle
import sys

import pytest
import torch
from PIL import Image

from ldm_lab.data import hub
from ldm_lab.data.hub import HubImages
from ldm_lab.utils.errors import UserError

datasets = pytest.importorskip("datasets")


def png(n):
    file = io.BytesIO()
    Image.new("RGB", (8 + n, 9), (10 * n, 0, 255 - 10 * n)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "parquet"
    folder.mkdir()
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int64")})
    for part, rows in (("a", range(7)), ("b", range(7, 12))):
        content = {"picture": [{"bytes": png(n), "path": f"{n}.png"} for n in rows], "label": list(rows)}
        datasets.Dataset.from_dict(content, features).to_parquet(folder / f"{part}.parquet")
    return folder


@pytest.fixture(autouse=True)
def forget():
    hub._rows.cache_clear()
    hub._sizes.cache_clear()


def both(root, cache, **options):
    options = {"column": "picture", "val_fraction": 0.3, "cache_dir": cache, **options}
    return [HubImages(root, split, 8, **options) for split in ("train", "val")]


def test_each_row_is_a_file(photos, tmp_path):
    train, val = both(photos, tmp_path)
    names = sorted([*train.names.tolist(), *val.names.tolist()])
    assert names == [b"%09d" % n for n in range(12)]
    assert len(val) > 0
    for images in (train, val):
        for index, name in enumerate(images.names.tolist()):
            assert images.files.read(*images._locate(index)) == png(int(name))
            assert images.files.size(*images._locate(index)) == len(png(int(name)))
    again = pickle.loads(pickle.dumps(train))
    assert torch.equal(again[0, 0]["image"], train[0, 0]["image"])
    assert next(iter(train.files.members())) == ("000000000", (0, len(png(0))))


def test_the_hub_and_its_files_here_are_the_same_images(photos, tmp_path, monkeypatch):
    here = both(photos, tmp_path)
    fingerprints = [images.fingerprint() for images in here]
    asked, load = [], datasets.load_dataset

    def from_hub(name, subset, **options):
        asked.append((name, subset, options["revision"], options["split"]))
        return load("parquet", data_files=sorted(map(str, photos.iterdir())), split="train", cache_dir=tmp_path / "x")

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    there = both("me/faces@v1", tmp_path, subset="small", part="all")
    assert [images.fingerprint() for images in there] == fingerprints
    assert asked == [("me/faces", "small", "v1", "all")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(UserError, match=r"^data\.name=me/none: cannot be loaded: division by zero$"):
        len(both("me/none", tmp_path)[0])


def test_what_cannot_be(photos, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"parquet: data\.column=image: its columns are picture, label$"):
        len(both(photos, tmp_path, column="image")[0])
    with pytest.raises(UserError, match=r"^data\.name is not set: name a data set"):
        both(None, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no \.parquet files in this folder$"):
        len(both(tmp_path / "empty", tmp_path)[0])
    monkeypatch.setitem(sys.modules, "datasets", None)
    hub._rows.cache_clear()
    with pytest.raises(UserError, match=r"datasets is not installed: pip install 'ldm_lab\[hub\]'$"):
        len(both(photos, tmp_path)[0])
