"""Samples of a model for evaluation, in the same folder as the samples of `sample.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Trainer

from ldm_lab.checkpoints.locate import State
from ldm_lab.diffusion import samplers
from ldm_lab.metrics.images import FilePixels
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.runs.record import read_run
from ldm_lab.sampling import generate, guide
from ldm_lab.sampling.files import SampleFiles
from ldm_lab.utils import locks
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.writing import SaveError, require_writable

KEPT = ("sampler", "steps", "eta", "seed")
GUIDED = ("guide", "guidance", "guidance_interval")


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    Attributes:
        num_samples: number of samples.
        sampler: one of `ldm_lab.diffusion.samplers.SAMPLERS`.
        steps: UNet evaluations per sample.
        eta: eta of DDIM.
        seed: sample i is drawn from (seed, i).
        batch_size: images at a time on each device.
        ema: length of the weights' average (see `checkpoints.averages`); None: the usual average.
        guide: the guide, anything that `checkpoints.locate.find` takes; None: no guidance.
        guidance: scale w of autoguidance; 1: none.
        guidance_interval: noise levels between which the guide acts; None: everywhere.
    """

    num_samples: int
    sampler: str
    steps: int
    eta: float
    seed: int
    batch_size: int
    ema: float | None = None
    guide: str | None = None
    guidance: float = 1.0
    guidance_interval: Sequence[float] | None = None

    def settings(self) -> dict[str, Any]:
        """The settings that determine samples; those of average and guidance only where they are used."""
        used = (*KEPT, *(() if self.ema is None else ("ema",)), *(GUIDED if self.guidance != 1 else ()))
        return {name: getattr(self, name) for name in used}


def draw(
    pipe: LDMPipeline,
    state: State,
    source: str,
    how: Sampling,
    trainer: Trainer,
    first: bool,
    output: Path | None = None,
    plugins: Sequence[str] = (),
) -> FilePixels:
    """Draw the missing samples; returns all samples.

    Args:
        pipe: the model; its scheduler is replaced.
        state: state of the model.
        source: the user's name for the model.
        how: settings of sampling.
        trainer: distributes the work over its devices.
        first: whether this process may write.
        output: parent of the samples' folder if the model's folder is not writable.
        plugins: packages whose classes the guide may name.

    Raises:
        UserError: there is no such sampler, the guide does not fit, or the folder holds other samples.
        SaveError: no folder is writable.
    """
    pipe.scheduler = samplers.choose(how.sampler, pipe.scheduler, how.eta)
    wanted = how.settings()
    if how.guidance != 1:
        wanted["guide"] = guide.attach(pipe, how.guide, plugins)
    files = SampleFiles.deepest(pipe.vqvae.pixels)
    settings = generate.SampleSettings(**wanted, precision=trainer.precision, files=files)
    folder = _folder(generate.default_folder(state, settings), files, how.num_samples, output)
    manifest = generate.describe(pipe, source, settings, how.guide)
    more = {"guidance": settings.how_guided, "files": files}
    module = generate.SamplingModule(pipe, folder, how.seed, how.steps, how.eta, **more)
    missing = generate.MissingSamples(folder, how.num_samples, how.batch_size, files=files)
    with locks.alone(folder, "another --seed", first):
        if first:
            generate.claim(folder, manifest, "--output")
        trainer.predict(module, datamodule=missing, return_predictions=False)
        trainer.strategy.barrier()
    paths = [files.path(folder, index) for index in range(how.num_samples)]
    return FilePixels(paths, source, generate.identity(manifest), files.read, files.pixels)


def _folder(usual: Path, files: SampleFiles, num_samples: int, output: Path | None) -> Path:
    """The usual folder of samples, unless samples are missing there and it is not writable."""
    try:
        if files.missing(usual, num_samples):
            require_writable(usual, "--output")
    except SaveError:
        if output is None:
            raise
        return output / "samples" / usual.name
    return usual


def images_seen(state: State) -> int | None:
    """Training images of a state; for a run's result those of the whole run; `None` if it is not from a run."""
    if state.images_seen is not None:
        return state.images_seen
    try:
        status = read_run(state.source).stages["diffusion"].status
    except (LoadError, KeyError):
        return None
    return status.get("max_images") if status.get("finished") else None
