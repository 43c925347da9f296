"""Every check, on readings that are in order and on such that are not."""

import math

import pytest
import torch

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.objective import DenoisingObjective, L1Loss, L2Loss, MinSNRWeighting, PlainWeighting
from ldm_lab.diffusion.timesteps import UniformTimesteps
from ldm_lab.runs.diagnosis import autoencoder, diffusion, training
from ldm_lab.runs.diagnosis.checks import diagnose
from ldm_lab.runs.diagnosis.finding import BAD, LOOK, OK, UNKNOWN, Healthy, Readings, median
from ldm_lab.runs.diagnosis.folder import left_out, sheet
from ldm_lab.runs.record import StageRecord
from tests.tools.report.runs import write_picture, write_stage

SCHEDULER = {"_target_": "ldm_lab.diffusion.ddim.DDIMScheduler", "num_train_timesteps": 100, "clip_sample": False}


def config(prediction="epsilon", loss="L2Loss", weighting="PlainWeighting", **more):
    part = "ldm_lab.diffusion.objective."
    objective = {"loss": {"_target_": part + loss}, "weighting": {"_target_": part + weighting}}
    return {
        "max_images": 100_000,
        "trainer": {"gradient_clip_val": 1.0},
        "model": {
            "scheduler": {**SCHEDULER, "prediction_type": prediction},
            "objective": objective,
            "autoencoder": {"num_vq_embeddings": 512},
            "loss": {"discriminator": {"_target_": "x"}, "adversarial": {"start_images": 10_000}},
        },
    } | more


def readings(settings=None, stage="diffusion", **metrics):
    """`val_loss=[1, 2]` are the values of val/loss every 10,000 images, the newest at 100,000."""
    curves = {
        name.replace("_", "/", 1): [
            (100_000 - 10_000 * (len(values) - 1 - place), value) for place, value in enumerate(values)
        ]
        for name, values in metrics.items()
    }
    return Readings(stage, settings or config(), curves)


GAME = {"disc_logits_real": [0.5], "disc_logits_fake": [-0.5]}
CASES = [
    (diffusion.scale, {"val_latent_std": [1.02]}, OK),
    (diffusion.scale, {"val_latent_std": [0.7]}, LOOK),
    (diffusion.scale, {"val_latent_std": [0.18]}, BAD),
    (diffusion.scale, {"val_latent_std": [5.5]}, BAD),
    (diffusion.learned, {"val_loss": [0.2]}, OK),
    (diffusion.learned, {"val_loss": [0.7]}, LOOK),
    (diffusion.learned, {"val_loss": [0.99, 0.99]}, BAD),
    (diffusion.learned, {"val_loss": [0.99, 0.99], "val_latent_std": [9.0]}, BAD),  # eps: whatever the latents
    (diffusion.overfitting, {"val_loss": [0.21], "val_loss_on_training_images": [0.2]}, OK),
    (diffusion.overfitting, {"val_loss": [0.25], "val_loss_on_training_images": [0.2]}, LOOK),
    (diffusion.overfitting, {"val_loss": [0.4], "val_loss_on_training_images": [0.2]}, BAD),
    (diffusion.risen, {"val_loss": [0.4, 0.3, 0.2]}, OK),
    (diffusion.risen, {"val_loss": [0.4, 0.2, 0.23]}, LOOK),
    (diffusion.risen, {"val_loss": [0.4, 0.2, 0.3]}, BAD),
    (autoencoder.reconstruction, {"val_psnr": [27.0]}, OK),
    (autoencoder.reconstruction, {"val_psnr": [20.0]}, LOOK),
    (autoencoder.reconstruction, {"val_psnr": [9.0, 9.0]}, BAD),
    (autoencoder.colours, {"val_hues_kept": [0.93]}, OK),
    (autoencoder.colours, {"val_hues_kept": [0.6]}, LOOK),
    (autoencoder.colours, {"val_hues_kept": [0.05, 0.2]}, LOOK),  # it rises
    (autoencoder.colours, {"val_hues_kept": [0.2, 0.2]}, BAD),
    (autoencoder.spread, {"val_latent_std": [0.64]}, OK),
    (autoencoder.spread, {"val_latent_std": [30.0]}, LOOK),
    (autoencoder.spread, {"val_latent_std": [1e-5]}, BAD),
    (autoencoder.codebook, {"codebook_perplexity": [307.0]}, OK),
    (autoencoder.codebook, {"codebook_perplexity": [20.0]}, LOOK),
    (autoencoder.codebook, {"codebook_perplexity": [2.0]}, BAD),
    (autoencoder.discriminator, {"disc_discriminator": [0.8], **GAME}, OK),
    (autoencoder.discriminator, {"disc_discriminator": [0.1], **GAME}, LOOK),
    (autoencoder.discriminator, {"disc_discriminator": [0.001], **GAME}, BAD),
    (autoencoder.discriminator, {"disc_discriminator": [1.0], **GAME, "disc_logits_fake": [0.5]}, BAD),
    (training.finite, {"train_loss": [1.0, 0.5]}, OK),
    (training.finite, {"train_loss": [1.0, math.nan], "val_loss": [1.0]}, BAD),
    (training.finite, {"val_loss": [math.inf]}, BAD),
    (training.loss, {"train_loss": [1.0, 0.2]}, OK),
    (training.loss, {"train_loss": [1.0, 1.5]}, LOOK),
    (training.loss, {"train_loss": [1.0, 9.0]}, BAD),
    (training.gradients, {"train_grad_norm": [2.0, 1.0, 0.9]}, OK),
    (training.gradients, {"train_grad_norm": [1.0, 1.0, 90.0]}, LOOK),
    (training.gradients, {"train_grad_norm": [0.0, 0.0, 0.0]}, BAD),
    (training.learning_rate, {"train_lr": [1e-3, 5e-4, 0.0]}, OK),  # at its end
    (training.learning_rate, {"train_lr": [0.0, 0.0]}, BAD),
    (training.throughput, {"perf_images_per_second": [50.0] * 8}, OK),
    (training.throughput, {"perf_images_per_second": [50.0] * 8 + [10.0] * 3}, LOOK),
]  # fmt: skip


@pytest.mark.parametrize(("check", "metrics", "verdict"), CASES)
def test_each_check_can_be_in_order_and_not(check, metrics, verdict):
    found = check(readings(**metrics))
    assert found.verdict == verdict, found
    assert found.advice or verdict == OK
    assert "\n" not in str(found)


def test_every_check_is_among_the_cases_and_every_verdict_but_those_that_cannot_be():
    reached = {}
    for check, _, verdict in CASES:
        reached.setdefault(check.__name__, set()).add(verdict)
    asked = {check.__name__ for name in ("autoencoder", "diffusion") for check in checks_of(name)}
    assert asked == set(reached)
    assert all(OK in verdicts and len(verdicts) > 1 for verdicts in reached.values())


def checks_of(stage):
    from ldm_lab.runs.diagnosis.checks import ALWAYS, OF_STAGE

    return (*ALWAYS, *OF_STAGE[stage])


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_what_was_not_logged_is_one_short_line(stage):
    found = diagnose(Readings(stage, config(), {"train/other": [(200, 1.0)]}))
    assert {finding.verdict for finding in found if finding.check != "numbers"} == {UNKNOWN}
    assert all(len(str(finding)) < 100 for finding in found)


def test_what_a_stage_does_not_have_is_not_asked_for():
    without = config(model={"autoencoder": {}, "loss": {"discriminator": None}})
    assert autoencoder.codebook(readings(without)) is None
    assert autoencoder.discriminator(readings(without)) is None
    early = Readings("autoencoder", config(), {"disc/discriminator": [(10_000, 0.0)]})
    assert autoencoder.discriminator(early) is None


def test_a_single_code_is_a_collapse_whatever_their_number():
    few = config(model={"autoencoder": {"num_vq_embeddings": 16}})
    assert [autoencoder.codebook(readings(few, codebook_perplexity=[p])).verdict for p in (1.9, 8.0)] == [BAD, OK]


def test_a_schedule_that_ends_before_the_training_is_seen():
    settings = config(max_images=500_000)
    assert training.learning_rate(readings(settings, train_lr=[1e-3, 1e-6])).verdict == LOOK
    assert training.learning_rate(readings(settings, train_lr=[1e-3, 5e-4])).verdict == OK


@pytest.mark.parametrize(
    ("check", "metric"), [(diffusion.learned, "val_loss"), (autoencoder.reconstruction, "val_psnr")]
)
def test_what_is_bad_is_broken_only_where_it_does_not_become_better(check, metric):
    better, worse = {"val_loss": (0.98, 1.0), "val_psnr": (9.5, 9.0)}[metric]
    early = Readings("diffusion", config(), {metric.replace("_", "/"): [(10, worse), (20, worse)]})
    assert check(early).verdict == LOOK
    assert check(readings(**{metric: [worse, better]})).verdict == LOOK
    assert check(readings(**{metric: [better, better]})).verdict == BAD
    assert check(readings(**{metric: [better, worse]})).verdict == BAD
    assert check(readings(**{metric: [better, math.nan]})).verdict == BAD


def test_a_stage_with_an_adversary_is_judged_by_its_reconstruction_loss():
    found = training.loss(readings(train_loss=[1.0, 9.0], train_nll=[1.0, 0.5]))
    assert found.verdict == OK


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("loss", "measure"), [("L2Loss", L2Loss), ("L1Loss", L1Loss)])
@pytest.mark.parametrize(
    ("weighting", "weights"), [("PlainWeighting", PlainWeighting), ("MinSNRWeighting", MinSNRWeighting)]
)
@pytest.mark.parametrize("std", [1.0, 0.3])
def test_predicting_zero_costs_what_the_objective_says(prediction, loss, measure, weighting, weights, std):
    scheduler = DDIMScheduler(num_train_timesteps=100, prediction_type=prediction, clip_sample=False)
    objective = DenoisingObjective(scheduler, measure(), weights(), UniformTimesteps())
    random = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(100, 3, 64, 64, generator=random) for _ in range(2))
    found = objective(lambda x, _: torch.zeros_like(x), std * x0, noise, torch.arange(100)).mean()
    computed = diffusion.loss_of_zero(config(prediction, loss, weighting), std)
    assert computed == pytest.approx(float(found), rel=5e-3)


def test_epsilon_by_the_book():
    assert diffusion.loss_of_zero(config()) == pytest.approx(1.0)
    assert diffusion.loss_of_zero(config(loss="L1Loss")) == pytest.approx(0.798, abs=1e-3)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"scheduler": SCHEDULER},
        {"scheduler": {**SCHEDULER, "prediction_type": "x"}, "objective": config()["model"]["objective"]},
        {"scheduler": SCHEDULER, "objective": {"weighting": {"_target_": "os.system"}}},
        {"scheduler": SCHEDULER, "objective": {"weighting": {"_target_": "ldm_lab.diffusion.objective.torch"}}},
        {"scheduler": 3, "objective": {}},
    ],
)  # fmt: skip
def test_an_objective_of_others_is_not_judged(model):
    assert diffusion.learned(readings({"model": model}, val_loss=[0.5])).verdict == UNKNOWN


def test_ranges_in_words():
    assert [str(Healthy(0.5, 2)), str(Healthy(low=3)), str(Healthy(high=3))] == ["0.5 to 2", "at least 3", "at most 3"]
    assert Healthy(low=1).verdict(math.nan) == BAD
    assert math.isnan(median([1.0, math.nan]))


def test_the_sheet_of_images(tmp_path):
    stage = write_stage(tmp_path / "x/diffusion", rows={1: {"a": 1}})
    assert sheet(StageRecord(stage, "diffusion")).verdict == UNKNOWN
    path = write_picture(stage, "data", 0, "black")
    assert sheet(StageRecord(stage, "diffusion")).verdict == BAD
    from PIL import Image

    Image.linear_gradient("L").save(path)
    found = sheet(StageRecord(stage, "diffusion"))
    assert found.verdict == OK
    assert str(path) in found.measured


def test_steps_that_were_not_finite(tmp_path):
    stage = write_stage(tmp_path / "x/diffusion", rows={20: {"a": 1}})
    record = StageRecord(stage, "diffusion")
    assert left_out(record) is None
    (stage / "not_finite").mkdir()
    (stage / "not_finite/000000010.json").write_text("{}")
    assert left_out(record).verdict == LOOK
    (stage / "not_finite/000000024.json").write_text("{}")
    assert left_out(record).verdict == BAD
