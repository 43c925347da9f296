"""Loads first stages of any kind from any source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm_lab.checkpoints import checkpoint, compvis
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.models.kl_model import AutoencoderKL
from ldm_lab.models.vq_model import VQModel
from ldm_lab.utils import hub
from ldm_lab.utils.reading import LoadError, read_json
from ldm_lab.utils.weights import LEGACY_WEIGHTS, OWN_WEIGHTS, WEIGHTS

FIRST_STAGES = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}


def load_autoencoder(source: str | Path, plugins: Sequence[str] = ()) -> FirstStage:
    """Load a first stage of any kind.

    Args:
        source: a model folder or its weights file, a pipeline folder (its first stage is in `vqvae` or `vae`), a run
            folder, a training checkpoint, a CompVis checkpoint of either stage, or a name on the hub.
        plugins: packages whose classes the config may name too.

    Raises:
        LoadError: the first stage is missing or corrupt; the message says how to make one.
    """
    source, kinds = hub.local(source), tuple(FIRST_STAGES.values())
    beside = source.with_name(FirstStage.config_name)
    if source.name in (WEIGHTS, OWN_WEIGHTS, LEGACY_WEIGHTS) and beside.is_file():
        source = source.parent
    if source.is_file():
        found = (
            {"vqvae": compvis.read_first_stage(source)} if compvis.is_checkpoint(source) else checkpoint.parts(source)
        )
        return checkpoint.network(found, "vqvae", kinds, plugins, str(source))
    for folder in (source, source / "vqvae", source / "vae", source / "autoencoder/final", source / "final"):
        path = folder / FirstStage.config_name
        if path.is_file():
            return checkpoint.class_of(read_json(path), kinds, plugins, f"{path}: the first stage").from_pretrained(
                folder
            )
    raise LoadError(f"{source}: there is no first stage here (a folder with {FirstStage.config_name})")
