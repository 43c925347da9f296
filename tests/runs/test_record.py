"""Reading what runs leave behind: the folders of real runs, and such as are none."""

import json

import numpy as np
import pytest

from ldm_lab.runs.record import last, read_evaluation, read_run
from ldm_lab.utils.reading import LoadError


def stage(folder, name, metrics="images_seen,val/loss\n10,0.5\n20,0.25\n"):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"stage: {name}\nmax_images: 20\n")
    (folder / "metrics.csv").write_text(metrics)
    return folder


def test_a_run_is_its_stages_and_a_stage_is_a_run_of_one(tmp_path):
    stage(tmp_path / "x/autoencoder", "autoencoder")
    folder = stage(tmp_path / "x/diffusion", "diffusion")
    run = read_run(tmp_path / "x")
    assert (run.name, list(run.stages)) == ("x", ["autoencoder", "diffusion"])
    assert list(read_run(folder).stages) == ["diffusion"]
    found = run.stages["diffusion"]
    assert found.curves == {"val/loss": [(10, 0.5), (20, 0.25)]}
    assert (last(found.curves["val/loss"]), found.images_seen, found.status) == (0.25, 20, {})


def test_empty_cells_are_left_out_and_what_is_not_finite_stays(tmp_path):
    folder = stage(tmp_path / "diffusion", "diffusion", "images_seen,a,b\n1,,2\n3,nan,\n")
    curves = read_run(folder).stages["diffusion"].curves
    assert curves["b"] == [(1, 2.0)]
    assert curves["a"][0][0] == 3
    assert curves["a"][0][1] != curves["a"][0][1]


def test_pictures_by_name_and_images_seen(tmp_path):
    folder = stage(tmp_path / "diffusion", "diffusion")
    (folder / "samples").mkdir()
    for name in ("samples_000000020.png", "samples_000000010.png", "samples_raw_000000010.png", "grid.png"):
        (folder / "samples" / name).touch()
    pictures = read_run(folder).stages["diffusion"].pictures
    assert {name: list(found) for name, found in pictures.items()} == {"samples": [10, 20], "samples_raw": [10]}


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_what_is_no_run_is_said(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(LoadError, match=r"x: (no such folder|no run)"):
        read_run(tmp_path / "x")


def test_evaluations_are_checked(tmp_path):
    stage(tmp_path / "x/diffusion", "diffusion")
    (tmp_path / "x/eval").mkdir()
    good = tmp_path / "x/eval/a.json"
    good.write_text(json.dumps({"metrics": {"fid": {"value": 3.0, "low": 2.0, "high": 4.0}}}))
    assert read_run(tmp_path / "x").evaluations[0].metrics["fid"]["low"] == 2.0
    bad = tmp_path / "x/eval/b.json"
    for content in (
        {"fid": 3},
        {"metrics": {"fid": 3}},
        {"metrics": {"fid": {"value": "low"}}},
        {"metrics": {"fid": {"value": 10**400}}},
    ):
        bad.write_text(json.dumps(content))
        with pytest.raises(LoadError, match=r"b\.json: is no evaluation"):
            read_evaluation(bad)


def test_equal_images_are_told_without_reading_them(tmp_path):
    found = []
    for name, marks in (("a", [1, 2]), ("b", [1, 2]), ("c", [1, 3])):
        folder = stage(tmp_path / name / "diffusion", "diffusion")
        assert read_run(folder).stages["diffusion"].images == {}
        np.savez(folder / "data.npz", train=np.array(marks), val=np.array([7]))
        found.append(read_run(folder).stages["diffusion"].images)
    assert found[0] == found[1]
    assert found[0]["train"] != found[2]["train"]
    assert found[0]["val"] == found[2]["val"]
