"""Train: `python train.py experiment=avatars`. configs/ describes the stages, ldm_lab/config/stages.py runs them."""

from __future__ import annotations

from ldm_lab.config.compose import Recipe, run
from ldm_lab.utils.errors import doing

USAGE = """Train a latent diffusion model: an autoencoder, then diffusion on its latents.

  python train.py                                        the demo, seventeen minutes on two CPU cores
  python train.py experiment=folder data.root=FOLDER     your own images; plan=true only measures
  python train.py experiment=celebahq data.root=FOLDER   both stages; the same command again resumes
  python train.py experiment=celebahq/autoencoder        one stage
  python train.py experiment=avatars trainer=ddp trainer.devices=2
  python train.py -m experiment=avatars seed=1,2         a sweep; every job is a run of its own name

Any key of configs/ is set as key=value; `--cfg job` shows them all. The everyday ones: seed, name, max_images,
data.root, data.image_size, data.global_batch_size, data.batch_size, data.num_workers, autoencoder, init, resume,
paths.runs. debug=tiny runs any experiment with tiny networks in seconds."""


def job(overrides: list[str]) -> float | None:
    """Run the stages of one recipe, each with the autoencoder that the recipe has just made."""
    recipe = Recipe.parse(overrides)
    configs = recipe.compose()

    from ldm_lab.config import stages
    from ldm_lab.training.watch import watched
    from ldm_lab.utils.terminal import say

    if len(configs) > 1 and any(override.key_or_group == "autoencoder" for override in recipe.overrides):
        configs = [config for config in configs if config.stage != "autoencoder"]
        say(f"autoencoder={configs[0].autoencoder} is given: its stage is skipped")
    if not overrides:
        say("This is the demo: cartoon faces, both stages, about seventeen minutes on two CPU cores.")
        say("Others: python train.py experiment=folder data.root=FOLDER; more with --help")
    say(f"{recipe.experiment} -> {configs[0].paths.runs}/{configs[0].name}")
    changes = {config.stage: stages.initial_settings(config, recipe.typed) for config in configs}
    if any(changes.values()):
        configs = [config for config in recipe.compose(changes) if config.stage in changes]
    command = recipe.command("autoencoder")
    stages.preflight(configs, command, recipe.typed)
    if configs[0].plan:
        stages.plan(configs, command)
        return None
    metrics: dict[str, float] = {}
    for before, config in zip([None, *configs], configs, strict=False):
        if before is not None:
            config.autoencoder = f"{before.paths.stage}/final"
        with watched(), doing(f"training stage {config.stage} of {config.paths.runs}/{config.name}"):
            metrics = stages.train(config, command, recipe.typed)
    trained = configs[-1]
    say(f"Done. Next: {stages.sampling(trained) if trained.stage == 'diffusion' else recipe.command('diffusion')}")
    return stages.optimized(metrics, configs[-1].optimized_metric)


if __name__ == "__main__":
    run("train", job, USAGE)
