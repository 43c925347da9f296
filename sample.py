"""Sample: `python sample.py ckpt=runs/celebahq num_samples=50000 trainer=ddp`. How: ldm_lab/config/sampling.py."""

from __future__ import annotations

from ldm_lab.config.compose import compose_sample, run

USAGE = """Draw images from a trained model.

  python sample.py ckpt=runs/celebahq                                   64 images with 50 steps of DDIM
  python sample.py ckpt=runs/celebahq num_samples=50000 sampler.steps=200 trainer=ddp trainer.devices=8
  python sample.py ckpt=runs/celebahq@2M                                its snapshot at two million training images
  python sample.py ckpt=runs/celebahq guide=runs/celebahq@500k guidance=2   guided by its own early snapshot
  python sample.py ckpt=model.ckpt original_config=config.yaml          a checkpoint of CompVis/latent-diffusion

Keys: ckpt (run folder, finished or not, its snapshot, pipeline folder, training checkpoint, file of CompVis, hub name),
original_config (of a file of CompVis; the one beside it is found by itself), num_samples, batch_size, seed, sampler
(ddim, ddpm, dpm_solver; flow_euler or flow_heun for models of process=flow), sampler.steps, sampler.eta, output
(folder), trainer, guide with guidance and guidance_interval (autoguidance), ema (length of the average of the weights),
compile, and for large images tiling and slicing. Pictures beside the samples: denoising=8 (how the first eight come
about), interpolate=[3,17] (from one sample to another), variation=image.png with strength, reconstruct=folder;
num_samples=0 for these alone.
The same command again draws only what is missing."""


def job(overrides: list[str]) -> None:
    """Draw what is missing of the samples asked for."""
    config = compose_sample(overrides)

    from ldm_lab.config.sampling import sample  # with torch, after the config was checked

    sample(config)


if __name__ == "__main__":
    run("sample", job, USAGE)
