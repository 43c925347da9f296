"""Samples to files on any number of devices: indices -> `LDMPipeline` -> files, through `Trainer.predict`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldm_lab.checkpoints import checkpoint
from ldm_lab.checkpoints.locate import State
from ldm_lab.diffusion.guidance import NO_GUIDANCE, Guidance
from ldm_lab.diffusion.samplers import SAMPLERS
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.sampling import guide
from ldm_lab.sampling.files import RGB_PNG, SUFFIXES, SampleFiles
from ldm_lab.utils import locks
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.images import save_pngs
from ldm_lab.utils.randomness import generators
from ldm_lab.utils.reading import read_json
from ldm_lab.utils.version import __version__
from ldm_lab.utils.writing import require_writable, write_json

MANIFEST = "manifest.json"
UNGUIDED = {"guide": None, "guidance": 1.0, "guidance_interval": None}
# Settings that are missing in older manifests -> their values then.
ADDED = {"compile": False, "tiling": False, "ema": None, "files": asdict(RGB_PNG), **UNGUIDED}
NOT_OF_SAMPLES = ("ckpt", "guide_ckpt", "evaluations", "versions")  # keys of the manifest that change no image


class SamplingModule(LightningModule):
    """Draws sample i from (seed, i) and writes its file: the same image on any number of devices.

    Args:
        pipe: the model; its scheduler is the sampler.
        folder: folder of the images.
        seed: seed of all samples.
        steps: UNet evaluations per sample.
        eta: 0 for deterministic DDIM.
        compiled: whether to compile the networks, once they are on their device.
        guidance: how the guide of `pipe` acts.
        files: kind of the files.
    """

    def __init__(
        self,
        pipe: LDMPipeline,
        folder: Path,
        seed: int,
        steps: int,
        eta: float,
        compiled: bool = False,
        guidance: Guidance = NO_GUIDANCE,
        files: SampleFiles = RGB_PNG,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(pipe.networks)  # so that Lightning moves them
        self.pipe, self.folder, self.seed, self.steps, self.eta = pipe, folder, seed, steps, eta
        self.compiled, self.files = compiled, files
        self.guided = {"guidance_scale": guidance.scale, "guidance_interval": guidance.interval}
        pipe.set_progress_bar_config(disable=True)

    def on_predict_start(self) -> None:
        """Compile the networks on request, now that Lightning has moved them to the device."""
        if self.compiled:
            self.pipe.compile()

    def predict_step(self, batch: Tensor, _: int) -> None:
        """Sample indices `(B,)` and write a file for each; an index may repeat."""
        indices, deep = batch.tolist(), self.files.bit_depth > 8
        how = {"output_type": "np" if deep else "pil", **self.guided}
        images = self.pipe(len(indices), generators(self.seed, indices), self.eta, self.steps, **how).images
        save = self.files.write if deep else save_pngs
        save({self.files.path(self.folder, index): image for index, image in zip(indices, images, strict=True)})


class MissingSamples(LightningDataModule):
    """Data module of the sample indices that have no file yet, split over the devices.

    The first device lists the files and broadcasts the list: devices that list files themselves may see different
    files, and then no device would draw some of the samples.

    Args:
        folder: folder of the images.
        num_samples: total number of samples wanted.
        batch_size: images at a time on each device.
        full: whether to pad the last batch (see `loader`).
        files: kind of the files.

    Attributes:
        count: number of missing samples; known once sampling has begun.
    """

    def __init__(
        self, folder: Path, num_samples: int, batch_size: int, full: bool = False, files: SampleFiles = RGB_PNG
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer samples than devices
        self.folder, self.num_samples, self.batch_size = folder, num_samples, batch_size
        self.full, self.files = full, files
        self.count = 0

    def predict_dataloader(self) -> DataLoader:
        """Index batches of this device."""
        trainer = self.trainer
        missing = self.files.missing(self.folder, self.num_samples) if trainer.is_global_zero else []
        indices = trainer.strategy.broadcast(missing)
        self.count = len(indices)
        return loader(indices, self.batch_size, trainer.global_rank, trainer.world_size, self.full)


@dataclass(frozen=True)
class SampleSettings:
    """The settings, besides the model, that determine samples; the manifest records them.

    Attributes:
        seed: sample i is drawn from (seed, i).
        sampler: one of `ldm_lab.diffusion.samplers.SAMPLERS`.
        steps: UNet evaluations per sample.
        eta: eta of DDIM.
        precision: precision of the networks.
        compile: whether the networks are compiled.
        tiling: whether the first stage decodes in tiles.
        ema: length of the weights' average (see `checkpoints.averages`); None: the usual average.
        guide: fingerprint of the guide's weights; None without guidance.
        guidance: scale w of autoguidance; 1: none.
        guidance_interval: noise levels between which the guide acts; None: everywhere.
        files: kind of the files.
    """

    seed: int
    sampler: str
    steps: int
    eta: float
    precision: str
    compile: bool = False
    tiling: bool = False
    ema: float | None = None
    guide: str | None = None
    guidance: float = 1.0
    guidance_interval: Sequence[float] | None = None
    files: SampleFiles = RGB_PNG

    @property
    def how_guided(self) -> Guidance:
        """Scale and interval of the guidance."""
        return Guidance(self.guidance, self.guidance_interval)


def default_folder(state: State, settings: SampleSettings) -> Path:
    """A folder for each model state and sampler: in `samples/` of the source folder, or beside a source file."""
    source = state.source
    samples = source / "samples" if source.is_dir() else source.with_name(f"{source.stem}_samples")
    name = f"{settings.sampler}_{settings.steps}_eta{settings.eta:g}_seed{settings.seed}"
    if settings.guide:
        name += f"_{settings.how_guided.slug}_by{settings.guide[:8]}"
    name += "_16bit" if settings.files.bit_depth == 16 else ""
    name += "" if state.images_seen is None else f"_at{state.images_seen}"
    return samples / (name if settings.ema is None else f"{name}_ema{settings.ema}")


def loader(indices: list[int], batch_size: int, rank: int = 0, world_size: int = 1, full: bool = False) -> DataLoader:
    """Batches of the indices for device `rank` of `world_size`, perhaps none; each index goes to one device.

    Args:
        indices: indices for all devices.
        batch_size: indices per batch.
        rank: rank of this device.
        world_size: number of devices.
        full: pad the last batch with its last index, as compiled networks have one batch size.
    """
    of_device = indices[rank::world_size]
    surplus = of_device[-1:] * (-len(of_device) % batch_size) if full else []
    return DataLoader(of_device + surplus, batch_size=batch_size)  # type: ignore[arg-type]


def describe(pipe: LDMPipeline, ckpt: str, settings: SampleSettings, guide_ckpt: str | None = None) -> dict[str, Any]:
    """The manifest: everything that determines the images, the cost of each, and the versions that made them.

    Args:
        pipe: the model with its sampler.
        ckpt: name of the model as typed.
        settings: settings of the samples.
        guide_ckpt: name of the guide as typed.
    """
    hashes = {name: checkpoint.fingerprint(getattr(pipe, name)) for name in ("unet", "vqvae")}
    versions = {"ldm_lab": __version__, "torch": torch.__version__}
    known = {"ckpt": ckpt, "hashes": hashes, **asdict(settings), "scheduler": dict(pipe.scheduler.config)}
    if settings.guide:
        known["guide_ckpt"] = guide_ckpt
    return {**known, "evaluations": guide.evaluations(pipe, settings.steps, settings.how_guided), "versions": versions}


def identity(manifest: dict[str, Any]) -> str:
    """Hash of everything that determines samples; settings that change nothing are left out, as older versions did."""
    left_out = {*NOT_OF_SAMPLES, *(UNGUIDED if manifest.get("guide") is None else ())}
    left_out |= {"files"} if _as_read(manifest.get("files")) == _as_read(ADDED["files"]) else set()
    settings = {key: value for key, value in manifest.items() if key not in left_out}
    return blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def claim(folder: Path, manifest: dict[str, Any], key: str = "output=") -> None:
    """Write the manifest, or check that existing samples have the same model and settings.

    Removes partial files of a killed process.

    Args:
        folder: folder of the samples.
        manifest: see `describe`.
        key: the setting that chooses another folder, for messages.

    Raises:
        UserError: the folder holds something else; the folder is left untouched.
        SaveError: the manifest cannot be written.
    """
    path = folder / MANIFEST
    unfinished = [*folder.glob(".*.tmp"), *folder.glob("images/.*.tmp")]  # names of `replacing`'s temporary files
    if not path.is_file() and folder.is_dir() and set(folder.iterdir()) - {*unfinished, folder / locks.NAME}:
        raise UserError(f"output={folder} is not empty and has no {MANIFEST}: choose another output=")
    samples = (path for path in folder.glob("images/*") if path.suffix in SUFFIXES)
    if not any(samples):  # without samples, another model may claim the folder
        require_writable(folder, key)
        _remove(unfinished)
        write_json(path, manifest)
        return
    new = _as_read(manifest)
    old = _as_read(_completed(read_json(path), new))
    changed = [key for key in new if key not in NOT_OF_SAMPLES and old.get(key) != new[key]]
    if changed:
        values = "; ".join(f"{key}: {old.get(key)} -> {new[key]}" for key in changed)
        raise UserError(f"output={folder} holds samples of other settings ({values}): choose another output=")
    _remove(unfinished)


def _completed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A manifest completed by the settings that its version lacked, at the values that have no effect."""
    kind, scheduler = SAMPLERS.get(str(old.get("sampler"))), old.get("scheduler")
    if kind is None or not isinstance(scheduler, dict):
        return {**ADDED, **old}
    added = {key: value for key, value in kind().config.items() if key in new["scheduler"]}
    return {**ADDED, **old, "scheduler": {**added, **scheduler}}


def _as_read(value: Any) -> Any:  # noqa: ANN401
    """Plain data as a JSON file gives them back: lists for tuples."""
    return json.loads(json.dumps(value))


def _remove(files: list[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def image_size(pipe: LDMPipeline) -> tuple[int, int]:
    """(height, width) of a pipeline's images. Raises `UserError` if the UNet's config has no sample size."""
    height, width = pipe.noise(1).shape[2:]
    return height * pipe.vqvae.downsample_factor, width * pipe.vqvae.downsample_factor
