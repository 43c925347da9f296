"""Which run is better, by how much, and which numbers do not compare."""

import math

import pytest

from ldm_lab.runs.metrics import direction
from ldm_lab.runs.record import read_run
from ldm_lab.tools.report.compare import compare, verdict
from ldm_lab.tools.report.evaluations import series
from ldm_lab.tools.report.values import best, thinned
from tests.tools.report.runs import MODEL, OBJECTIVE, write_evaluation, write_run, write_stage


def compared(tmp_path, one=None, other=None, names=("a", "b")):
    """The comparisons and the verdict of two runs with these settings."""
    for name, settings in zip(names, (one, other), strict=True):
        if not (tmp_path / name).exists():
            write_run(tmp_path / name, **(settings or {}))
    runs = [read_run(tmp_path / name) for name in names]
    found = compare(runs, names)
    return {comparison.metric: comparison for comparison in found}, verdict(found, names)


def test_the_lower_loss_is_better_by_its_part_of_the_other(tmp_path):
    found, words = compared(tmp_path, {"loss": (0.5, 0.25)}, {"loss": (0.6, 0.2)})
    loss = found["val/loss"]
    assert (loss.best, loss.compares, loss.amount) == (1, True, "20 % lower than a")
    assert words == "b is better: diffusion val/loss 20 % lower than a."
    value = loss.values[1]
    assert (value.value, value.file, value.images_seen) == (0.2, tmp_path / "b/diffusion/metrics.csv", 20)


def test_runs_are_compared_at_the_same_images(tmp_path):
    write_stage(tmp_path / "b/diffusion", rows={10: {"val/loss": 0.4}, 30: {"val/loss": 0.01}})
    found, _ = compared(tmp_path, {"loss": (0.5, 0.25)})
    assert [value.images_seen for value in found["val/loss"].values] == [10, 10]
    write_stage(tmp_path / "c/diffusion", rows={11: {"val/loss": 0.1}})
    found, _ = compared(tmp_path, names=("a", "c"))
    assert [value.images_seen for value in found["val/loss"].values] == [20, 11]
    assert found["val/loss"].says.endswith("at different numbers of images")


def test_a_small_difference_of_single_numbers_says_nothing(tmp_path):
    found, words = compared(tmp_path, {"loss": (0.5, 0.25)}, {"loss": (0.5, 0.2499)})
    assert found["val/loss"].best is None
    assert words == "No difference can be told from the 1 number(s) that compare."


@pytest.mark.parametrize(
    ("one", "other", "best"),
    [((5.0, 4.5, 5.5), (6.0, 5.6, 6.4), 0), ((5.0, 4.5, 5.5), (5.6, 5.4, 6.4), None), (5.0, (6.0, 5.6, 6.4), 0)],
)
def test_intervals_decide_where_both_have_one(tmp_path, one, other, best):
    for name, value in (("a", one), ("b", other)):
        write_run(tmp_path / name)
        write_evaluation(tmp_path / name, {"fid": value})
    found, _ = compared(tmp_path)
    assert found["eval/fid"].best == best
    assert ("intervals" in found["eval/fid"].says) == isinstance(one, tuple)


def test_a_higher_psnr_is_better_in_decibels(tmp_path):
    for name, psnr in (("a", 27.0), ("b", 25.5)):
        write_stage(tmp_path / name / "autoencoder", "autoencoder", {20: {"val/psnr": psnr}})
    found, words = compared(tmp_path)
    assert words == "a is better: autoencoder val/psnr 1.50 dB higher than b."
    assert found["val/psnr"].best == 0


def test_numbers_that_disagree_are_told_apart(tmp_path):
    for name, loss, fid in (("a", (0.5, 0.2), 9.0), ("b", (0.5, 0.3), 5.0)):
        write_run(tmp_path / name, loss=loss)
        write_evaluation(tmp_path / name, {"fid": fid})
    _, words = compared(tmp_path)
    assert words == "The numbers disagree. Better is b on eval/fid; a on diffusion val/loss."


OTHER = {**OBJECTIVE, "weighting": {"_target_": "ldm_lab.diffusion.objective.MinSNRWeighting", "gamma": 5.0}}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"marks": (1, 3)}, "the held-out images differ (data.npz)"),
        ({"data": {"module": {"val_set": {"image_size": 16}}}}, "the held-out images differ (data."),
        ({"data": {"module": {"val_set": {"root": "/b"}}}, "marks": ()}, "the held-out images differ (data."),
        ({"model": {**MODEL, "objective": OTHER}}, "another quantity (model.objective.weighting._target_: "),
        ({"model": {**MODEL, "scheduler": {"prediction_type": "sample"}}}, "another quantity (model.scheduler."),
        ({"autoencoder_hash": "f"}, "another quantity (autoencoder_hash: None and f)"),
    ],
)
def test_what_is_another_quantity_is_refused_with_the_reason(tmp_path, settings, reason):
    found, words = compared(tmp_path, {"loss": (0.5, 0.4)}, {"loss": (0.5, 0.1), **settings})
    assert not found["val/loss"].compares
    assert found["val/loss"].best is None
    assert found["val/loss"].says.startswith(f"does not compare: {reason}")
    assert words == "No number of these runs compares; the reasons stand beside them."


@pytest.mark.parametrize(
    "settings",
    [
        {"data": {**{"image_size": 8}, "module": {"val_set": {
            "_target_": "ldm_lab.data.images.FolderImages", "image_size": 8, "root": "/elsewhere", "flip": True}}}},
        {"model": {**MODEL, "optimizer": {"lr": 1.0}}},
        {"model": {**MODEL, "scheduler": {"prediction_type": "epsilon", "timestep_spacing": "trailing"}}},
        {"seed": 5},
    ],
)  # fmt: skip
def test_what_leaves_the_quantity_alone_is_compared(tmp_path, settings):
    found, _ = compared(tmp_path, {"loss": (0.5, 0.4)}, {"loss": (0.5, 0.1), **settings})
    assert found["val/loss"].best == 1


@pytest.mark.parametrize(
    "more",
    [
        {"num_samples": 50},
        {"extractor": {"name": "inception", "fingerprint": "b"}},
        {"reference": {"source": "x", "fingerprint": "s"}},
        {"kind": "reconstructions"},
    ],
)
def test_evaluations_by_other_rules_are_refused(tmp_path, more):
    for name, changed in (("a", {}), ("b", more)):
        write_run(tmp_path / name)
        write_evaluation(tmp_path / name, {"fid": 5.0 if changed else 9.0}, **changed)
    found, _ = compared(tmp_path)
    assert found["eval/fid"].says.startswith("does not compare: measured differently (")
    assert found["eval/fid"].best is None


def test_of_several_evaluations_those_by_the_same_rules_are_taken_the_newest_first(tmp_path):
    for name, values in (("a", (9.0, 8.0)), ("b", (7.0, 6.0))):
        write_run(tmp_path / name)
        for images, value in zip((10, 20), values, strict=True):
            write_evaluation(tmp_path / name, {"fid": value}, f"{images}", images)
    write_evaluation(tmp_path / "b", {"fid": 1.0}, "more", 30, num_samples=1000)
    found, _ = compared(tmp_path)
    assert [value.value for value in found["eval/fid"].values] == [8.0, 6.0]
    assert found["eval/fid"].values[1].file == tmp_path / "b/eval/20.json"


def test_what_held_out_images_have_is_said_beside_it(tmp_path):
    for name, fid in (("a", 9.0), ("b", 5.0)):
        write_run(tmp_path / name)
        write_evaluation(tmp_path / name, {"fid": fid}, held_out={"count": 5, "metrics": {"fid": {"value": 1.25}}})
    found, _ = compared(tmp_path)
    assert found["eval/fid"].says == "b is better: 44 % lower than a; held-out images themselves have 1.25"


def test_another_sampler_is_said(tmp_path):
    for name, steps in (("a", 20), ("b", 50)):
        write_run(tmp_path / name)
        write_evaluation(tmp_path / name, {"fid": steps}, sampling={"sampler": "ddim", "steps": steps})
    found, _ = compared(tmp_path)
    assert found["eval/fid"].best == 0
    assert found["eval/fid"].says.endswith("sampled differently")


def test_what_is_not_finite_is_not_compared(tmp_path):
    found, _ = compared(tmp_path, {"loss": (0.5, math.nan)}, {"loss": (0.5, 0.1)})
    assert found["val/loss"].says == "does not compare: not finite in a"


def test_of_three_runs_the_best_is_set_against_the_next(tmp_path):
    for name, loss in (("a", 0.4), ("b", 0.1), ("c", 0.2)):
        write_run(tmp_path / name, loss=(0.5, loss))
    runs = [read_run(tmp_path / name) for name in "abc"]
    (found,) = compare(runs, "abc")
    assert found.says == "b is better: 50 % lower than c"


def test_one_run_alone_is_shown(tmp_path):
    runs = [read_run(write_run(tmp_path / "a"))]
    found = compare(runs, ["a"])
    assert [comparison.metric for comparison in found] == ["val/loss"]
    assert verdict(found, ["a"]) == "One run; give another to compare it with."


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("val/loss", "lower"), ("val/loss_t3", "lower"), ("eval/fd_avatars", "lower"), ("eval/precision", "higher"),
        ("codebook/perplexity", "higher"), ("val/latent_std", None), ("train/loss", None), ("perf/memory_gb", None),
    ],
)  # fmt: skip
def test_directions(metric, better):
    assert direction(metric) == better


def test_the_best_is_a_row(tmp_path):
    record = read_run(write_run(tmp_path / "a", loss=(0.1, 0.3))).stages["diffusion"]
    assert (best(record, "val/loss").value, best(record, "val/loss").images_seen) == (0.1, 10)


def test_a_thinned_curve_keeps_its_ends_and_its_spikes():
    curve = [(images, 1.0) for images in range(1000)]
    curve[777] = (777, 50.0)
    kept = thinned(curve, 100)
    assert len(kept) <= 100
    assert {curve[0], curve[777], curve[-1]} <= set(kept) <= set(curve)
    assert thinned(curve, 1000) == curve


def test_guided_samples_are_a_measurement_of_their_own(tmp_path):
    run = write_run(tmp_path / "a")
    how = {"sampler": "ddim", "steps": 20, "eta": 0.0, "seed": 0}
    guided = {**how, "guide": "runs/a@10", "guidance": 2.0, "guidance_interval": [0.2, 5]}
    write_evaluation(run, {"fid": 9.0}, "plain", sampling=how)
    write_evaluation(run, {"fid": 7.0}, "guided", sampling=guided)
    plain, better = sorted(series([read_run(run)]), key=lambda one: len(one.title))
    assert "guidance" not in plain.title
    assert "eta 0.0, guidance 2.0 by runs/a@10 at noise levels [0.2, 5], features: " in better.title
    assert [one.curves("fid") for one in (plain, better)] == [[[(20, 9.0)]], [[(20, 7.0)]]]
