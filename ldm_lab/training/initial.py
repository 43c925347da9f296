"""Starts a stage from the weights of another model: `init=SOURCE`.

Weights need their architecture, and a UNet also needs its noise schedule and its scale of the latents. These settings
come with the weights: they replace the values in config files, and must agree with the values that the user has typed.
Optimizer, counters and all other settings are the run's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm_lab.checkpoints import checkpoint
from ldm_lab.checkpoints.checkpoint import class_of
from ldm_lab.checkpoints.locate import State, search
from ldm_lab.diffusion.flow import is_flow
from ldm_lab.diffusion.scheduler import Scheduler
from ldm_lab.models.autoencoders import load_autoencoder
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.models.pretrained import Configurable, PretrainedModel
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.runs.folder import RunFolder
from ldm_lab.training.autoencoder_module import AutoencoderModule
from ldm_lab.training.diffusion_module import DiffusionModule
from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils import hub, signatures
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.nested import find, flatten
from ldm_lab.utils.reading import LoadError, read_json
from ldm_lab.utils.terminal import say

# For each stage: key of the config -> part of the source that must agree with it; the first part is trained.
NODES = {
    "autoencoder": {"model.autoencoder": "vqvae"},
    "diffusion": {"model.unet": "unet", "model.scheduler": "scheduler"},
}
OPEN = ("in_channels", "out_channels")  # None: taken from the latents, even if typed
# Arguments of a network that do not affect its weights; arguments of a scheduler that do affect a UNet's weights.
NOT_OF_WEIGHTS = ("sample_size", "dropout")
OF_WEIGHTS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A trained model: any state (see `ldm_lab.checkpoints.locate`), or the folder of a single network.

    Attributes:
        name: the value of `init=` that the user has typed.
        state: location of the model.
        configs: config of each part in the model: `vqvae`, `unet`, `scheduler`.
        plugins: packages whose classes the configs may name.
    """

    name: str
    state: State
    configs: dict[str, dict[str, Any]]
    plugins: Sequence[str] = ()

    def skeleton(self, part: str) -> Configurable:
        """Build a part from its config; a network's weights are on the meta device."""
        kind = class_of(self.configs[part], LDMPipeline.classes[part], self.plugins, f"init={self.name}: {part}")
        with torch.device("meta"):
            return kind.from_config(self.configs[part])

    def network(self, part: str) -> PretrainedModel:
        """Load a network with its weights; a UNet with its averaged weights."""
        path = self.state.path
        if path.is_file():
            found, kinds = checkpoint.parts(path), LDMPipeline.classes[part]
            return checkpoint.network(found, part, kinds, self.plugins, str(path))
        if part == "vqvae":
            return load_autoencoder(path, self.plugins)
        return type(self.skeleton(part)).from_pretrained(path / part if (path / part).is_dir() else path)


def open_source(name: str, stage: str, plugins: Sequence[str] = ()) -> Source:
    """Locate the model that `init=` names, without reading its weights.

    Stage 1 prefers the first stage of a pipeline to the result of a stage 1, as the pipeline knows the latents' scale.

    Raises:
        LoadError: there is no model, or no model for that stage.
    """
    local = hub.local(name)
    alone = Path(local, PretrainedModel.config_name)
    state = State(local, local) if alone.is_file() else search(local, "diffusion")
    if state is None and stage == "autoencoder":
        state = search(local, stage)
    source = Source(name, state, _configs(state.path, plugins), plugins) if state else None
    if source is None or next(iter(NODES[stage].values())) not in source.configs:
        raise LoadError(f"init={name}: there is no {'UNet' if stage == 'diffusion' else 'first stage'} here")
    return source


def _configs(path: Path, plugins: Sequence[str]) -> dict[str, dict[str, Any]]:
    if path.is_file():
        return checkpoint.configs(path)
    if (alone := path / PretrainedModel.config_name).is_file():
        config, kinds = read_json(alone), (*LDMPipeline.classes["vqvae"], *LDMPipeline.classes["unet"])
        return {"vqvae" if issubclass(class_of(config, kinds, plugins, str(alone)), FirstStage) else "unet": config}
    config_name = PretrainedModel.config_name
    places = {"unet": config_name, "vae": config_name, "vqvae": config_name, "scheduler": Scheduler.config_name}
    found = {place: path / place / file for place, file in places.items() if (path / place / file).is_file()}
    return {"vqvae" if place == "vae" else place: read_json(file) for place, file in found.items()}


def settings(config: dict[str, Any], typed: Collection[str]) -> dict[str, Any]:
    """The changes of `init=` to a stage's config, dotted key -> value; prints a line for each.

    A stage that has a checkpoint resumes with its settings of then, even if the source has changed or gone.

    Args:
        config: the stage's config, resolved.
        typed: keys that the user has set; their values must equal the source's.

    Raises:
        LoadError: the source cannot be used.
        UserError: a typed setting, or the class of network, differs from the source's.
    """
    if not config["init"]:
        return {}
    nodes = NODES[config["stage"]]
    if before := RunFolder(Path(config["paths"]["stage"])).started_with():
        ours = tuple(f"{node}." for node in nodes)
        return {k: v for k, v in flatten(before).items() if k.startswith(ours) and not _is_typed(k, typed)}
    source = open_source(config["init"], config["stage"], config["plugins"])
    images = source.state.images_seen
    say(f"init: {config['stage']} starts from {source.state.path}" + (f" at {images:,} images" if images else ""))
    changes = {}
    for node, part in nodes.items():
        if part in source.configs:
            changes |= _changes(source, node, find(config, node), source.skeleton(part), typed)
        else:
            say(f"init: {source.name} has no {part}; {node} stands")
    return changes


def _changes(
    source: Source, node: str, node_config: dict[str, Any], part: Configurable, typed: Collection[str]
) -> dict[str, Any]:
    keys: Sequence[str] = [key for key in OF_WEIGHTS if key in part.config]
    if isinstance(part, PretrainedModel):
        keys = [key for key in part.config if key not in NOT_OF_WEIGHTS]
        if not f".{node_config['_target_']}".endswith(f".{part.class_name()}"):
            raise UserError(
                f"{node} is {node_config['_target_']}, but init={source.name} holds {part.class_name()}:"
                " choose a model= of that kind, or other weights"
            )
    elif is_flow(signatures.named(node_config["_target_"])) != is_flow(type(part)):
        advice = "add" if is_flow(type(part)) else "leave out"
        raise UserError(
            f"{node} is {node_config['_target_']}, but init={source.name} was trained with {part.class_name()}:"
            f" {advice} process=flow, or take other weights"
        )
    arguments = inspect.signature(type(part).__init__).parameters
    changes = {}
    for key in keys:
        value, current, name = part.config[key], node_config.get(key, arguments[key].default), f"{node}.{key}"
        current = list(current) if isinstance(current, tuple) else current
        if key in OPEN and isinstance(part, FirstStage):
            _refuse_other_images(source, value, current)
            continue
        if current is None and key in OPEN:
            changes[name] = value
            continue
        if current != value and _is_typed(name, typed):
            raise UserError(f"{name}={current}, but init={source.name} was trained with {value}: leave {name} out")
        if current != value:
            say(f"init: {name} {current} -> {value}, from {source.name}")
            changes[name] = value
    return changes


def _refuse_other_images(source: Source, channels: int, wanted: int | None) -> None:
    if wanted not in (None, channels):
        raise UserError(
            f"init={source.name}: its autoencoder is for images of {channels} channel(s), and those here have {wanted}"
            " (data.channels): take other weights, or leave init out"
        )


def _is_typed(key: str, typed: Collection[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in typed)


def load(module: StageModule, config: dict[str, Any], typed: Collection[str]) -> None:
    """Load the weights of `init=` into a module that was built with the changes from `settings`.

    Args:
        module: the stage's module.
        config: the stage's config.
        typed: keys that the user has set.

    Raises:
        LoadError: the weights cannot be read, or do not fit.
        UserError: the user has typed another scaling factor than that of the UNet's training.
    """
    source = open_source(config["init"], config["stage"], config["plugins"])
    if isinstance(module, DiffusionModule):
        weights = source.network("unet").exported_state_dict()
        for network in (module.unet, module.ema.model):
            network.load_weights(weights, origin=source.name)
        _take_scale(module, source, "model.scaling_factor" in typed)
        return
    module.autoencoder.load_weights(source.network("vqvae").exported_state_dict(), origin=source.name)
    if isinstance(module, AutoencoderModule):
        module.keep_codes()


def _take_scale(module: DiffusionModule, source: Source, is_typed: bool) -> None:
    """Use the scaling factor of the UNet's training, if the UNet was trained on the latents of this autoencoder."""
    current = "measure" if module.measures_scale else module.autoencoder.config.scaling_factor
    vqvae = source.network("vqvae") if "vqvae" in source.configs else None
    if vqvae is None or vqvae.encoding != module.autoencoder.encoding:
        why = "comes without an autoencoder" if vqvae is None else "was trained on another autoencoder"
        say(f"init: the UNet of {source.name} {why}; model.scaling_factor={current} stands")
        return
    scale = vqvae.config.scaling_factor
    if current != scale and is_typed:
        raise UserError(
            f"model.scaling_factor={current}, but the UNet of init={source.name} was trained with {scale}:"
            " leave model.scaling_factor out"
        )
    if current != scale:
        say(f"init: model.scaling_factor {current} -> {scale:.6g}, from {source.name}")
    module.autoencoder.register_to_config(scaling_factor=scale)
    module.measures_scale = False
