"""The samples of a model: those that `sample.py` draws, in the folder where it keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Trainer

from ldm_lab.checkpoints.locate import State
from ldm_lab.diffusion import samplers
from ldm_lab.metrics.images import FilePixels
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.runs.record import read_run
from ldm_lab.sampling import generate
from ldm_lab.utils import locks
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.writing import SaveError, require_writable

KEPT = ("sampler", "steps", "eta", "seed")


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Attributes:
        num_samples: how many.
        sampler: one of `ldm_lab.diffusion.samplers.SAMPLERS`.
        steps: evaluations of the UNet.
        eta: of DDIM.
        seed: sample i is drawn from (seed, i).
        batch_size: images at a time on each device.
    """

    num_samples: int
    sampler: str
    steps: int
    eta: float
    seed: int
    batch_size: int

    def settings(self) -> dict[str, Any]:
        """What samples depend on beside the model."""
        return {name: getattr(self, name) for name in KEPT}


def draw(
    pipe: LDMPipeline,
    state: State,
    source: str,
    how: Sampling,
    trainer: Trainer,
    first: bool,
    output: Path | None = None,
) -> FilePixels:
    """The samples, drawn as far as they are missing.

    Args:
        pipe: the model; its scheduler is replaced.
        state: which it is.
        source: what the user calls it.
        how: they are drawn.
        trainer: shares the work among its devices.
        first: whether this process may write.
        output: below it they go where nothing can be written beside the model.

    Raises:
        UserError: there is no such sampler, or the folder holds samples of something else.
        SaveError: there is no place for them.
    """
    pipe.scheduler = samplers.choose(how.sampler, pipe.scheduler, how.eta)
    settings = generate.SampleSettings(**how.settings(), precision=trainer.precision)
    folder = _folder(generate.default_folder(state, settings), how.num_samples, output)
    manifest = generate.describe(pipe, source, settings)
    module = generate.SamplingModule(pipe, folder, how.seed, how.steps, how.eta)
    missing = generate.MissingSamples(folder, how.num_samples, how.batch_size)
    with locks.alone(folder, "another --seed", first):
        if first:
            generate.claim(folder, manifest, "--output")
        trainer.predict(module, datamodule=missing, return_predictions=False)
        trainer.strategy.barrier()
    paths = [generate.image_path(folder, index) for index in range(how.num_samples)]
    return FilePixels(paths, source, generate.identity(manifest))


def _folder(usual: Path, num_samples: int, output: Path | None) -> Path:
    """The usual place of samples, unless some are missing there and it cannot be written."""
    try:
        if generate.missing(usual, num_samples):
            require_writable(usual, "--output")
    except SaveError:
        if output is None:
            raise
        return output / "samples" / usual.name
    return usual


def images_seen(state: State) -> int | None:
    """Training images of a state; of the result of a run, those of the whole run; `None` for what is no run."""
    if state.images_seen is not None:
        return state.images_seen
    try:
        status = read_run(state.source).stages["diffusion"].status
    except (LoadError, KeyError):
        return None
    return status.get("max_images") if status.get("finished") else None
