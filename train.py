"""Train: `python train.py experiment=avatars`. What a stage is: configs/; how one runs: ldm_lab/training/run.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_lab.config import INTERRUPTED, Recipe, build, build_all, plain, run

if TYPE_CHECKING:
    from omegaconf import DictConfig

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

    from ldm_lab.training.run import say

    if len(configs) > 1 and any(override.key_or_group == "autoencoder" for override in recipe.overrides):
        configs = [config for config in configs if config.stage != "autoencoder"]
        say(f"autoencoder={configs[0].autoencoder} is given: its stage is skipped")
    if not overrides:
        say("This is the demo: cartoon faces, both stages, about ten minutes on two CPU cores.")
        say("Others: python train.py experiment=celebahq data.root=FOLDER; more with --help")
    say(f"{recipe.experiment} -> {configs[0].paths.runs}/{configs[0].name}")
    preflight(configs)
    metric = None
    for before, config in zip([None, *configs], configs, strict=False):
        if before is not None:
            config.autoencoder = f"{before.paths.stage}/final"
        metric = train_stage(config, recipe.command("autoencoder"))
    sampling = f"python sample.py ckpt={configs[-1].paths.runs}/{configs[-1].name}"
    say(f"Done. Next: {sampling if configs[-1].stage == 'diffusion' else recipe.command('diffusion')}")
    return metric


def preflight(configs: list[DictConfig]) -> None:
    """Say what each stage will train; what cannot be is refused before the first of them is trained."""
    import torch

    from ldm_lab.training.preflight import check_fit
    from ldm_lab.training.run import RunFolder, is_first_process, say

    made = {}
    for config in configs:
        if is_first_process():  # the others start when this one has begun to write
            RunFolder(Path(config.paths.stage)).check(plain(config))
        with torch.device("meta"):  # no memory for weights
            made |= stage_parts(config)
        network = made["unet" if config.stage == "diffusion" else "autoencoder"]
        size = f"{type(network).__name__} with {network.num_parameters() / 1e6:,.1f} M parameters"
        say(f"  {config.stage}: {size}, {config.max_images:,} images in batches of {config.data.global_batch_size}")
    if "autoencoder" in made:
        check_fit(configs[0].data.image_size, made["autoencoder"], made.get("unet"))


def stage_parts(config: DictConfig) -> dict[str, Any]:
    """The networks of a stage, and of stage 2 what is made from them."""
    model = config.model
    if config.stage == "autoencoder":
        return {"autoencoder": build(model.autoencoder, "model.autoencoder")}
    unet, scheduler = build(model.unet, "model.unet"), build(model.scheduler, "model.scheduler")
    objective = build(model.objective, "model.objective", scheduler=scheduler)
    return {"unet": unet, "scheduler": scheduler, "objective": objective}


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
    first = {"autoencoder": stage.first_stage(config.autoencoder, command)} if config.stage == "diffusion" else {}
    settings = {**plain(config), "autoencoder_hash": fingerprint(first["autoencoder"]) if first else None}
    if status := folder.finished(config.max_images, settings["autoencoder_hash"]):
        stage.say(f"{folder.folder} is finished at {config.max_images:,} images: nothing to do")
        return status.get("val/loss")
    data = build(config.data.module, "data")
    module = build(config.model, "model", **stage_parts(config), **first)
    loggers, callbacks = build_all(config.logger, "logger"), build_all(config.callbacks, "callbacks")
    trainer = build(
        config.trainer,
        "trainer",
        precision=device.resolve_precision(config.trainer.precision, config.trainer.accelerator),
        **stage.essentials(settings, callbacks, loggers),
    )
    stage.say(f"{config.stage} on {device.describe(trainer)}")
    if not stage.fit(module, data, trainer, folder, settings):
        stage.say(f"stopped and saved at {module.images_seen:,} images; the same command continues")
        sys.exit(INTERRUPTED)
    metrics = folder.status()
    stage.say(f"{folder.folder} is finished: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if "/" in k))
    return metrics.get("val/loss")


if __name__ == "__main__":
    run("train", job, USAGE)
