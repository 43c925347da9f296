"""Train: `python train.py experiment=avatars`. What a stage is: configs/; how one runs: ldm_lab/training/run.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_lab.config import INTERRUPTED, Recipe, build, build_all, plain, run

if TYPE_CHECKING:
    from collections.abc import Collection

    from omegaconf import DictConfig

    from ldm_lab.models.first_stage import FirstStage

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
    if configs[0].init:
        from ldm_lab.training import initial

        changes = {config.stage: initial.settings(plain(config), recipe.typed) for config in configs}
        configs = [config for config in recipe.compose(changes) if config.stage in changes]
    preflight(configs, recipe.command("autoencoder"))
    metrics: dict[str, float] = {}
    for before, config in zip([None, *configs], configs, strict=False):
        if before is not None:
            config.autoencoder = f"{before.paths.stage}/final"
        metrics = train_stage(config, recipe.command("autoencoder"), recipe.typed)
    sampling = f"python sample.py ckpt={configs[-1].paths.runs}/{configs[-1].name}"
    say(f"Done. Next: {sampling if configs[-1].stage == 'diffusion' else recipe.command('diffusion')}")
    return optimized(metrics, configs[-1].optimized_metric)


def preflight(configs: list[DictConfig], command: str) -> None:
    """Say what each stage will train; what cannot be is refused before the first of them is trained."""
    import torch

    from ldm_lab.training.preflight import check_fit, check_order
    from ldm_lab.training.run import RunFolder, first_stage, is_first_process, say

    folders = [RunFolder(Path(config.paths.stage)) for config in configs]
    if is_first_process():  # the others start when this one has begun to write
        for folder, config in zip(folders, configs, strict=True):
            folder.check(plain(config))
        check_order(folders, [config.max_images for config in configs])
    source = (configs[0].autoencoder, command, configs[0].plugins)
    autoencoder = first_stage(*source) if configs[0].stage == "diffusion" else None
    for config in configs:
        if config.model.get("train") == "decoder" and not config.init:
            raise ValueError("model.train=decoder: of which autoencoder? Name it with init=")
        with torch.device("meta"):  # no memory for weights
            parts = stage_parts(config, autoencoder)
        network = parts["unet" if config.stage == "diffusion" else "autoencoder"]
        size = f"{type(network).__name__} with {network.num_parameters() / 1e6:,.1f} M parameters"
        say(f"  {config.stage}: {size}, {config.max_images:,} images in batches of {config.data.global_batch_size}")
        autoencoder = parts.get("autoencoder", autoencoder)
        check_fit(config.data.image_size, autoencoder, parts.get("unet"))


def stage_parts(config: DictConfig, autoencoder: FirstStage | None) -> dict[str, Any]:
    """The networks of a stage, and of stage 2 what is made from them.

    A UNet whose config leaves its channels open has those of the latents of `autoencoder`.
    """
    model = config.model
    if config.stage == "autoencoder":
        return {"autoencoder": build(model.autoencoder, "model.autoencoder")}
    open_channels = [key for key in ("in_channels", "out_channels") if model.unet.get(key, 0) is None]
    unet = build(model.unet, "model.unet", **dict.fromkeys(open_channels, autoencoder.embed_dim))
    scheduler = build(model.scheduler, "model.scheduler")
    objective = build(model.objective, "model.objective", scheduler=scheduler)
    return {"unet": unet, "scheduler": scheduler, "objective": objective}


def train_stage(config: DictConfig, command: str, typed: Collection[str]) -> dict[str, float]:
    """Build one stage and train it to its end; returns the metrics of its last validation.

    Args:
        config: of the stage.
        command: makes the autoencoder, for the message where there is none.
        typed: keys that the user has given a value.
    """
    import torch

    from ldm_lab.checkpoint import fingerprint
    from ldm_lab.training import device, initial
    from ldm_lab.training import run as stage
    from ldm_lab.training.quiet import quiet

    quiet()
    folder = stage.RunFolder(Path(config.paths.stage))
    torch.manual_seed(config.seed)
    source = (config.autoencoder, command, config.plugins)
    autoencoder = stage.first_stage(*source) if config.stage == "diffusion" else None
    settings = {**plain(config), "autoencoder_hash": autoencoder and fingerprint(autoencoder)}
    if status := folder.finished(config.max_images, settings["autoencoder_hash"]):
        stage.say(f"{folder.folder} is finished at {config.max_images:,} images: nothing to do")
        return status
    data = build(config.data.module, "data")
    module = build(config.model, "model", **{"autoencoder": autoencoder, **stage_parts(config, autoencoder)})
    if config.init and not folder.last.is_file():
        initial.load(module, plain(config), typed)
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
    return metrics


def optimized(metrics: dict[str, Any], name: str) -> float:
    """The metric that a sweep compares. Raises `ValueError` where the last stage has none of that name."""
    if name not in metrics:
        there = ", ".join(key for key in metrics if "/" in key)
        raise ValueError(f"optimized_metric={name}: the last stage has {there}")
    return metrics[name]


if __name__ == "__main__":
    run("train", job, USAGE)
