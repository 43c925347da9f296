"""Runs `sample.py`: loads the model, draws the missing samples, and draws pictures beside them."""

from __future__ import annotations

from pathlib import Path

from lightning import Trainer

from ldm_lab.checkpoints import averages, locate
from ldm_lab.checkpoints.locate import State
from ldm_lab.config import kinds
from ldm_lab.config.build import DictConfig, build, plain
from ldm_lab.diffusion import samplers
from ldm_lab.diffusion.guidance import Guidance
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.runs import tracking
from ldm_lab.sampling import averaged, files, generate, guide
from ldm_lab.sampling.files import SampleFiles
from ldm_lab.sampling.generate import MissingSamples, SampleSettings
from ldm_lab.sampling.pictures import PictureRequest
from ldm_lab.training import device
from ldm_lab.training.quiet import quiet
from ldm_lab.training.watch import watched
from ldm_lab.utils import locks
from ldm_lab.utils.errors import UserError, doing
from ldm_lab.utils.terminal import is_first_process, say, say_once

PICTURES = ("denoising", "interpolate", "variation", "strength", "reconstruct", "max_pixels", "preview_channels")


def sample(config: DictConfig) -> None:
    """Draw the missing samples of a config, and the pictures that it requests.

    Raises:
        UserError: a setting is invalid; the message names its key.
        LoadError: the model is missing or corrupt.
    """
    quiet()
    kinds.check(plain(config))
    device.check(plain(config.trainer))
    state = located(config)
    pipe = load_pipeline(config, state)
    settings = settings_of(config, pipe, load_guide(config, pipe))
    cost = guide.evaluations(pipe, settings.steps, settings.how_guided)  # all processes refuse too many steps
    trainer = make_trainer(config, settings.precision)
    pictures = requested_pictures(config, pipe)
    folder = Path(config.output or generate.default_folder(state, settings))
    with locks.alone(folder, "another output=", is_first_process()):
        if is_first_process():
            images = state.images_seen
            stands = "finished" if images is None else f"not finished, at {images:,} images: {state.path}"
            say(f"{config.ckpt}: {stands}")
            if settings.guide:
                say(f"a sample costs {cost['unet']} evaluations of the UNet and {cost['guide']} of the guide")
            manifest = generate.describe(pipe, config.ckpt, settings, config.guide)
            generate.claim(folder, manifest)
        drawn = draw(config, pipe, settings, trainer, folder)
        if is_first_process():
            collected = files.collect(folder, config.num_samples, settings.files, pictures.preview_channels)
            written = ["manifest.json", *collected]
            written += write_pictures(pictures, pipe, settings, trainer, folder)
            if drawn:
                used, made = ("diffusion", manifest["hashes"]["unet"]), ("samples", generate.identity(manifest))
                tracking.log_to_run(state.source / "diffusion", folder, used, made, manifest)
            say(f"{config.num_samples:,} samples ({drawn:,} new) in {folder}: {', '.join(written)}")


def located(config: DictConfig) -> State:
    """The state that `ckpt=` names; with `ema=` a snapshot."""
    state = locate.find(config.ckpt)
    return state if config.ema is None else averages.snapshot_of(state, f"ema={config.ema}")


def load_pipeline(config: DictConfig, state: State) -> LDMPipeline:
    """Load the model of `ckpt=`, with the sampler and the memory options of the config."""
    reading = {"plugins": config.plugins, "given": averaged.given(state, config.ema, "ema", config.plugins)}
    if config.original_config:
        reading = {"single_file": {"original_config": config.original_config}}
    pipe = LDMPipeline.from_file_or_folder(state.path, **reading)
    pipe.scheduler = samplers.choose(config.sampler.name, pipe.scheduler, config.sampler.eta or 0.0)
    if config.tiling:
        pipe.vqvae.enable_tiling()
    if config.slicing:
        pipe.vqvae.enable_slicing()
    return pipe


def load_guide(config: DictConfig, pipe: LDMPipeline) -> str | None:
    """Load the guide of `guide=` into the pipeline, and return its fingerprint; None if guidance is off.

    Raises:
        UserError: guidance without a guide, a wrong interval, or a guide that does not fit.
    """
    Guidance(config.guidance, plain(config)["guidance_interval"])
    if config.guidance == 1:
        if config.guide:
            say_once(f"guide={config.guide}: has no effect at guidance=1; add guidance=2, for example")
        return None
    if not config.guide:
        raise UserError(
            f"guidance={config.guidance:g}: needs guide=, a smaller or less trained model, e.g. {config.ckpt}@500k"
        )
    return guide.attach(pipe, config.guide, config.plugins)


def settings_of(config: DictConfig, pipe: LDMPipeline, guide_hash: str | None = None) -> SampleSettings:
    """The settings that, together with the model, determine the samples.

    Args:
        config: the config.
        pipe: the model.
        guide_hash: fingerprint of the guide; None: no guidance.
    """
    sampler = config.sampler
    precision = device.resolve_precision(config.trainer.precision, config.trainer.accelerator)
    more = {"compile": config.compile, "tiling": config.tiling, "ema": config.ema}
    more["files"] = SampleFiles.of(pipe.vqvae.pixels, config.bit_depth)
    if guide_hash:
        interval = plain(config)["guidance_interval"]
        interval = interval and [float(end) for end in interval]  # as `evaluate` reads them: 2 and 2.0 are the same
        more |= {"guide": guide_hash, "guidance": float(config.guidance), "guidance_interval": interval}
    return SampleSettings(config.seed, sampler.name, sampler.steps, sampler.eta or 0.0, precision, **more)


def make_trainer(config: DictConfig, precision: str) -> Trainer:
    """The trainer that distributes the work over devices.

    With `bf16-true` and `16-true`, `draw` rounds the networks: Lightning would compute all else in that type too.
    """
    computed = "32-true" if precision in device.ROUNDED else precision
    return build(config.trainer, "trainer", precision=computed, enable_progress_bar=True, logger=False)


def requested_pictures(config: DictConfig, pipe: LDMPipeline) -> PictureRequest:
    """The pictures that a config requests. Raises `UserError` if one is impossible, or if there is nothing to draw."""
    request = PictureRequest(**{name: plain(config)[name] for name in PICTURES})
    request.check(pipe)
    if not (config.num_samples or request):
        raise UserError("num_samples=0: name how many, or a picture: denoising, interpolate, variation, reconstruct")
    return request


def draw(config: DictConfig, pipe: LDMPipeline, settings: SampleSettings, trainer: Trainer, folder: Path) -> int:
    """Draw the missing samples on all devices; returns their number."""
    pipe.to(dtype=device.ROUNDED.get(settings.precision))
    how = (settings.seed, settings.steps, settings.eta, settings.compile, settings.how_guided, settings.files)
    module = generate.SamplingModule(pipe, folder, *how)
    samples = MissingSamples(folder, config.num_samples, config.batch_size, settings.compile, settings.files)
    with watched(), doing(f"drawing samples into {folder}"):
        trainer.predict(module, datamodule=samples, return_predictions=False)
        trainer.strategy.barrier()
    return samples.count


def write_pictures(
    request: PictureRequest, pipe: LDMPipeline, settings: SampleSettings, trainer: Trainer, folder: Path
) -> list[str]:
    """Draw the requested pictures on this device; returns the names of their files."""
    if not request:
        return []
    pipe.to(trainer.strategy.root_device)  # Lightning has moved the networks away
    with trainer.precision_plugin.forward_context():
        return request.write(pipe, folder, settings.seed, settings.steps, settings.eta, settings.how_guided)
