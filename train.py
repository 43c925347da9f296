"""Train: `python train.py experiment=avatars`. What a stage is: configs/; how one runs: ldm_lab/training/run.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_lab.config import INTERRUPTED, ConfigError, Recipe, build, build_all, plain, run

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from ldm_lab.models.unet import UNet2DModel
    from ldm_lab.models.vq_model import VQModel
    from ldm_lab.serialization import PretrainedModel

USAGE = """Train a latent diffusion model: an autoencoder, then diffusion on its latents.

  python train.py                                        the demo, ten minutes on two CPU cores
  python train.py experiment=celebahq data.root=FOLDER   both stages; the same command again resumes
  python train.py experiment=celebahq/autoencoder        one stage
  python train.py experiment=avatars trainer=ddp trainer.devices=2
  python train.py -m experiment=avatars seed=1,2         a sweep; every job is a run of its own name

Any key of configs/ is set as key=value; `--cfg job` shows them all. The everyday ones: seed, name, max_images,
data.root, data.image_size, data.global_batch_size, data.batch_size, data.num_workers, autoencoder, resume, paths.runs.
debug=tiny runs any experiment with tiny networks in seconds."""


def job(overrides: list[str]) -> float | None:
    """Run the stages of one recipe, each with the autoencoder that the recipe has just made."""
    recipe = Recipe.parse(overrides)
    configs = recipe.compose()
    if len(configs) > 1 and any(override.key_or_group == "autoencoder" for override in recipe.overrides):
        configs = [config for config in configs if config.stage != "autoencoder"]
        say(f"autoencoder={configs[0].autoencoder} is given: its stage is skipped")
    if not overrides:
        say("This is the demo: cartoon faces, both stages, about ten minutes on two CPU cores.")
        say("Others: python train.py experiment=celebahq data.root=FOLDER; more with --help")
    say(f"{recipe.experiment} -> {configs[0].paths.runs}/{configs[0].name}")
    networks: list[PretrainedModel] = []
    for config in configs:
        networks.append(announce(config, *networks))
    if configs[0].stage == "autoencoder":
        check_size(configs[0].data.image_size, *networks)
    metric = None
    for before, config in zip([None, *configs], configs, strict=False):
        if before is not None:
            config.autoencoder = f"{before.paths.stage}/final"
        metric = train_stage(config, stage_command(recipe, "autoencoder"))
    sampling = f"python sample.py ckpt={configs[-1].paths.runs}/{configs[-1].name}"
    say(f"Done. Next: {sampling if configs[-1].stage == 'diffusion' else stage_command(recipe, 'diffusion')}")
    return metric


def announce(config: DictConfig, autoencoder: VQModel | None = None) -> PretrainedModel:
    """Say what a stage will train; what cannot be is refused here, for all stages before the first is trained.

    Args:
        config: of the stage.
        autoencoder: the network of the stage before, if the recipe has one.

    Returns:
        The stage's network, without memory for its weights.
    """
    import torch

    from ldm_lab.pipeline import LDMPipeline
    from ldm_lab.training.run import RunFolder, is_first_process

    if is_first_process():  # the others start when this one has begun to write
        RunFolder(Path(config.paths.stage)).check(plain(config))
    key = {"autoencoder": "autoencoder", "diffusion": "unet"}[config.stage]
    with torch.device("meta"):
        network = build(config.model[key], f"model.{key}")
    size = f"{type(network).__name__} with {network.num_parameters() / 1e6:,.1f} M parameters"
    say(f"  {config.stage}: {size}, {config.max_images:,} images in batches of {config.data.global_batch_size}")
    if config.stage == "diffusion":
        scheduler = build(config.model.scheduler, "model.scheduler")
        build(config.model.objective, "model.objective", scheduler=scheduler)
        if autoencoder is not None:
            LDMPipeline(autoencoder, network, scheduler)  # refuses parts that do not fit
    return network


def check_size(image_size: int | list[int], autoencoder: VQModel, unet: UNet2DModel | None = None) -> None:
    """Raise `ConfigError` where images of that size do not pass through the networks."""
    import torch

    from ldm_lab.data.transforms import parse_size

    with torch.device("meta"):
        images = torch.empty(1, autoencoder.config.in_channels, *parse_size(image_size))
        try:
            latents = autoencoder.encode(images).latents
            if unet is not None:
                unet(latents, torch.zeros(1))
        except ValueError as error:
            raise ConfigError(f"data.image_size={image_size} does not fit the networks: {error}") from error


def stage_command(recipe: Recipe, stage: str) -> str:
    """What to type for one stage of the run that `recipe` trains."""
    experiment = recipe.stages[-1].rpartition("/")[0]
    where = [o.input_line for o in recipe.overrides if o.key_or_group in ("debug", "name", "data.root", "paths.runs")]
    return " ".join(["python train.py", f"experiment={experiment}/{stage}", *where])


def train_stage(config: DictConfig, command: str) -> float | None:
    """Build one stage and train it to its end; returns its last `val/loss`.

    Args:
        config: of the stage.
        command: makes the autoencoder, for the message where there is none.
    """
    import torch

    from ldm_lab.checkpoint import fingerprint
    from ldm_lab.training import device
    from ldm_lab.training import run as stage
    from ldm_lab.training.quiet import quiet

    quiet()
    folder = stage.RunFolder(Path(config.paths.stage))
    torch.manual_seed(config.seed)
    vqvae = stage.first_stage(config.autoencoder, command) if config.stage == "diffusion" else None
    settings = {**plain(config), "autoencoder_hash": fingerprint(vqvae) if vqvae else None}
    if status := folder.finished(config.max_images, settings["autoencoder_hash"]):
        say(f"{folder.folder} is finished at {config.max_images:,} images: nothing to do")
        return status.get("val/loss")
    data = build(config.data.module, "data")
    module = build(config.model, "model", **parts(config.model, vqvae))
    loggers, callbacks = build_all(config.logger, "logger"), build_all(config.callbacks, "callbacks")
    trainer = build(
        config.trainer,
        "trainer",
        precision=device.resolve_precision(config.trainer.precision, config.trainer.accelerator),
        **stage.essentials(settings, callbacks, loggers),
    )
    say(f"{config.stage} on {device.describe(trainer)}")
    if not stage.fit(module, data, trainer, folder, settings):
        say(f"stopped and saved at {module.images_seen:,} images; the same command continues")
        sys.exit(INTERRUPTED)
    metrics = folder.status()
    say(f"{folder.folder} is finished: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if "/" in k))
    return metrics.get("val/loss")


def parts(model: DictConfig, vqvae: Any) -> dict[str, Any]:  # noqa: ANN401
    """Of stage 2, the parts that are made from other parts."""
    if vqvae is None:
        return {}
    unet, scheduler = build(model.unet, "model.unet"), build(model.scheduler, "model.scheduler")
    objective = build(model.objective, "model.objective", scheduler=scheduler)
    return {"unet": unet, "scheduler": scheduler, "objective": objective, "autoencoder": vqvae}


def say(line: str) -> None:
    """Print once, not once a rank."""
    from ldm_lab.training.run import is_first_process

    if is_first_process():
        print(line, flush=True)


if __name__ == "__main__":
    run("train", job, USAGE)
