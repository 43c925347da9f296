"""Stages as `train.py` builds them, for tests that need no run folder."""

import torch

from ldm_lab.config import stages
from ldm_lab.config.compose import Recipe
from ldm_lab.training.planning.trial import Trial


def tiny(experiment, *overrides):
    """A stage of an experiment with tiny networks, untrained: module, data, and what makes its trainer."""
    recipe, stage = experiment.split("/")
    configs = {c.stage: c for c in Recipe.parse([f"experiment={recipe}", "debug=tiny", *overrides]).compose()}
    # A fixed draw: the gradient of L1 is a sign, and one that rounding turns around is no rounding any more.
    torch.manual_seed(0)
    autoencoder = stages.networks(configs["autoencoder"], None)["autoencoder"]
    return stages.parts(configs[stage], autoencoder)


def trial(experiment="celebahq/diffusion", *overrides):
    """A trial of it."""
    return Trial(*tiny(experiment, *overrides))
