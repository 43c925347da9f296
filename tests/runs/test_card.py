"""The model card: what it says is what the run has recorded; what is not ours stays."""

import json

import pytest

from ldm_lab.runs import card
from ldm_lab.runs.record import RunRecord, StageRecord

CONFIG = "stage: diffusion\nname: faces\nmax_images: 5000\nseed: 3\nmodel: {optimizer: {lr: 0.0001}}\n"


@pytest.fixture
def run(tmp_path):
    stage = tmp_path / "faces/diffusion"
    (stage / "final").mkdir(parents=True)
    (stage / "samples").mkdir()
    (stage / "config.yaml").write_text(CONFIG)
    for images in (4000, 5000):
        (stage / f"samples/samples_{images:09d}.png").write_bytes(b"%d" % images)
    return RunRecord(tmp_path / "faces", {"diffusion": StageRecord(stage, "diffusion")})


def test_figures_settings_and_the_newest_picture(run):
    (run.folder / "eval").mkdir()
    found = {"kind": "samples", "num_samples": 500, "sampling": {"steps": 20}}
    found["metrics"] = {"fid": {"value": 5.113, "low": 5.0, "high": 5.25}}
    (run.folder / "eval/a.json").write_text(json.dumps(found))
    card.write(run, "diffusion", {"val/loss": 0.02877})
    text = (run.folder / "README.md").read_text()
    assert text.startswith("---\n# written by ldm_lab")
    for line in (
        "| val/loss | 0.02877 | held-out images, after 5,000 training images |",
        "| fid | 5.113 (5 to 5.25) | 500 samples (steps 20) |",
        "| model.optimizer.lr | 0.0001 |",
        "![samples](samples.png)",
        'LDMPipeline.from_pretrained("faces")',
    ):
        assert line in text
    assert (run.folder / "samples.png").read_bytes() == b"5000"
    assert (run.folder / "diffusion/final/README.md").read_text() == text


def test_new_evaluations_are_taken_up_where_a_result_is(run):
    (run.folder / "diffusion/status.json").write_text('{"finished": true, "max_images": 5000, "val/loss": 0.5}')
    card.refresh(run.folder)
    assert "| val/loss | 0.5 |" in (run.folder / "README.md").read_text()
    (run.folder / "eval").mkdir()
    found = {"kind": "samples", "num_samples": 9, "metrics": {"kid": {"value": 0.25}}}
    (run.folder / "eval/a.json").write_text(json.dumps(found))
    card.refresh(run.folder)
    assert "| kid | 0.25 | 9 samples |" in (run.folder / "README.md").read_text()
    card.refresh(run.folder.parent)  # no run: nothing happens


def test_a_card_of_somebodys_own_stays(run):
    card.write(run, "diffusion", {})
    own = run.folder / "README.md"
    own.write_text("# my faces\n")
    card.write(run, "diffusion", {"val/loss": 1.0})
    assert own.read_text() == "# my faces\n"
    assert "val/loss" in (run.folder / "diffusion/final/README.md").read_text()


def test_a_first_stage_has_one_of_its_own(run):
    stage = run.folder / "autoencoder"
    (stage / "final").mkdir(parents=True)
    (stage / "config.yaml").write_text("stage: autoencoder\nname: a|<b>\nmax_images: 10\n")
    (stage / "final/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    card.write(RunRecord(run.folder, {"autoencoder": StageRecord(stage, "autoencoder")}), "autoencoder", {"a|b": 1.0})
    text = (stage / "final/README.md").read_text()
    assert "AutoencoderKL.from_pretrained" in text
    assert "| a\\|b | 1 |" in text
    assert "![" not in text
    assert not (run.folder / "README.md").exists()
