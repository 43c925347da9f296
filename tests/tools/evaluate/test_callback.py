"""Figures of samples while training goes on: when, and without a trace in what is trained."""

import pytest

from ldm_lab.metrics import own
from ldm_lab.training.callbacks.evaluate import EvaluateSamples
from tests.trained import assert_equal, final_weights, metrics, train

METRICS = {f"eval/{name}" for name in ("fd_own", "kid", "precision", "recall", "density", "coverage")}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sampler": "euler"}, "sampler=euler"),
        ({"features": "clip"}, "features=clip"),
        ({"weights": "a.pth"}, "weights=a.pth"),
        ({"num_samples": 5}, "num_samples=5"),
    ],
)
def test_what_it_cannot_do_it_refuses_before_anything_is_trained(settings, named):
    with pytest.raises(ValueError, match=named):
        EvaluateSamples(None, "cache", **settings)


@pytest.mark.slow
def test_it_logs_with_validations_and_changes_nothing(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(own, "STEPS", 2)
    how = [
        "experiment=celebahq/diffusion", f"autoencoder={tiny_runs}/celebahq/autoencoder/final",
        "validate_every=16", "callbacks.evaluate.every_images=32", "callbacks.evaluate.num_samples=6",
        "callbacks.evaluate.steps=1", f"paths.cache={tmp_path}/cache",
    ]  # fmt: skip
    train(tmp_path, *how, "max_images=32")
    train(tmp_path, *how)  # goes on
    rows = metrics(tmp_path / "celebahq/diffusion")
    assert {seen for seen, row in rows.items() if row.keys() >= METRICS} == {32, 64}
    assert not any(METRICS & row.keys() for seen, row in rows.items() if seen not in (32, 64))
    assert_equal(final_weights(tmp_path / "celebahq/diffusion"), final_weights(tiny_runs / "celebahq/diffusion"))
