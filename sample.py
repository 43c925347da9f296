"""Sample: `python sample.py ckpt=runs/celebahq num_samples=50000 trainer=ddp`. How: ldm_lab/sampling/generate.py."""

from __future__ import annotations

from pathlib import Path

from ldm_lab.config.compose import build, compose_sample, plain, run

USAGE = """Draw images from a trained model.

  python sample.py ckpt=runs/celebahq                                   64 images with 50 steps of DDIM
  python sample.py ckpt=runs/celebahq num_samples=50000 sampler.steps=200 trainer=ddp trainer.devices=8
  python sample.py ckpt=runs/celebahq@2M                                its snapshot at two million training images
  python sample.py ckpt=model.ckpt original_config=config.yaml          a checkpoint of CompVis/latent-diffusion

Keys: ckpt (run folder, finished or not, its snapshot, pipeline folder, training checkpoint, file of CompVis, hub name),
original_config (of a file of CompVis; the one beside it is found by itself), num_samples, batch_size, seed, sampler
(ddim, ddpm, dpm_solver), sampler.steps, sampler.eta, output (folder), trainer, compile, and for large images tiling
and slicing. Pictures beside the samples: denoising=8 (how the first eight come about), interpolate=[3,17] (from one
sample to another), variation=image.png with strength, reconstruct=folder; num_samples=0 for these alone.
The same command again draws only what is missing."""


def job(overrides: list[str]) -> None:
    """Draw what is missing of the samples asked for."""
    config = compose_sample(overrides)

    from ldm_lab.checkpoints import locate
    from ldm_lab.config import kinds
    from ldm_lab.diffusion import samplers
    from ldm_lab.pipeline import LDMPipeline
    from ldm_lab.runs import tracking
    from ldm_lab.sampling import generate, pictures
    from ldm_lab.training import device
    from ldm_lab.training.quiet import quiet
    from ldm_lab.training.run import is_first_process
    from ldm_lab.training.watch import watched
    from ldm_lab.utils import locks
    from ldm_lab.utils.errors import UserError, doing

    quiet()
    kinds.check(plain(config))
    device.check(plain(config.trainer))
    state = locate.find(config.ckpt)
    if config.original_config:
        pipe = LDMPipeline.from_single_file(state.path, config.original_config)
    else:
        pipe = LDMPipeline.from_pretrained(state.path, plugins=config.plugins)
    name, steps, eta = config.sampler.name, config.sampler.steps, config.sampler.eta or 0.0
    pipe.scheduler = samplers.choose(name, pipe.scheduler, eta)
    precision = device.resolve_precision(config.trainer.precision, config.trainer.accelerator)
    rounded = device.ROUNDED.get(precision)  # by ourselves: Lightning would compute all else in that type too
    computed = "32-true" if rounded else precision
    trainer = build(config.trainer, "trainer", precision=computed, enable_progress_bar=True, logger=False)
    if config.tiling:
        pipe.vqvae.enable_tiling()
    if config.slicing:
        pipe.vqvae.enable_slicing()
    settings = {"seed": config.seed, "sampler": name, "steps": steps, "eta": eta, "precision": precision}
    settings |= {"compile": config.compile, "tiling": config.tiling}
    names = ("denoising", "interpolate", "variation", "strength", "reconstruct", "max_pixels")
    wanted = pictures.Wanted(**{name: plain(config)[name] for name in names})
    wanted.check(pipe)
    if not (config.num_samples or wanted):
        raise UserError("num_samples=0: name how many, or a picture: denoising, interpolate, variation, reconstruct")
    folder = Path(config.output or generate.default_folder(state, settings))
    with locks.alone(folder, "another output=", is_first_process()):
        if is_first_process():
            images = state.images_seen
            stands = "finished" if images is None else f"not finished, at {images:,} images: {state.path}"
            print(f"{config.ckpt}: {stands}", flush=True)
            manifest = generate.describe(pipe, config.ckpt, settings)
            generate.claim(folder, manifest)
        pipe.to(dtype=rounded)
        module = generate.SamplingModule(pipe, folder, config.seed, steps, eta, config.compile)
        samples = generate.MissingSamples(folder, config.num_samples, config.batch_size, full=config.compile)
        with watched(), doing(f"drawing samples into {folder}"):
            trainer.predict(module, datamodule=samples, return_predictions=False)
            trainer.strategy.barrier()
        if is_first_process():
            files = ["manifest.json", *generate.collect(folder, config.num_samples)]
            if wanted:
                pipe.to(trainer.strategy.root_device)  # from where Lightning has taken it away
                with trainer.precision_plugin.forward_context():
                    files += wanted.write(pipe, folder, config.seed, steps, eta)
            if samples.count:
                used, made = ("diffusion", manifest["hashes"]["unet"]), ("samples", generate.identity(manifest))
                tracking.log_to_run(state.source / "diffusion", folder, used, made, manifest)
            print(f"{config.num_samples:,} samples ({samples.count:,} new) in {folder}: {', '.join(files)}")


if __name__ == "__main__":
    run("sample", job, USAGE)
