"""`plan=true`: measures time, memory and disk of training with its real networks and images; writes no run."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ldm_lab.data.datamodule import ImageDataModule
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.training import device as devices
from ldm_lab.training.callbacks.encode import Encoder, check_room
from ldm_lab.training.latents import latent_cache, latent_shape, moments_shape
from ldm_lab.training.planning import memory
from ldm_lab.training.planning.memory import readable
from ldm_lab.training.planning.trial import Measured, Trial
from ldm_lab.utils.errors import UserError

STEPS, SECONDS = 20, 20.0  # limits of a trial, whichever comes first
ENCODING_SECONDS = 5.0


def show_stage(trial: Trial, max_images: int, snapshots: int | None) -> int:
    """Run a trial of a stage and print what training needs.

    Args:
        trial: trial of the stage.
        max_images: length of the stage.
        snapshots: images between two snapshots; None: no snapshots.

    Returns:
        Bytes that the stage will take on disk.

    Raises:
        UserError: the stage does not fit into memory; the message names the setting to lower.
    """
    module, data, world_size = trial.module, trial.data, trial.world_size
    batch_size = data.device_batch_size(world_size)
    print(f"{module.stage} on {devices.describe(trial.trainer)}", flush=True)
    measured = trial.attempt(batch_size, steps=STEPS, seconds=SECONDS)
    trained = [parameter for group in module.parameter_groups() for parameter in group["params"]]
    print(f"  parameters  {millions(trained)} M trained, {millions(module.parameters())} M in all")
    print(f"  memory      {memory_line(trial, measured, batch_size)}")
    print(f"  speed       {speed_line(measured, world_size)}")
    print(f"  time        {max_images:,} images in {duration(max_images / (measured.rate * world_size))}")
    if module.stage == "diffusion":
        print(f"  latents     {latents_line(module.autoencoder, data)}")
    if trial.moments:
        print(f"  encoding    {encoding_line(trial)}")
    needed = on_disk(trial, measured, max_images, snapshots)
    print(f"  disk        {readable(measured.checkpoint)} a checkpoint, {readable(needed)} for the stage")
    return needed


def check_disk(needed: int, runs: str | Path) -> None:
    """Print the disk space that a run needs, and the free space.

    Args:
        needed: bytes of all stages.
        runs: the folder of runs; it may not exist yet.

    Raises:
        UserError: the run needs more than is free.
    """
    folder = Path(runs).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"paths.runs={runs}: {readable(free)} are free, and the run will need {readable(needed)}:"
            " choose another place, or fewer snapshots"
        )
    print(f"disk: the run will need {readable(needed)} of the {readable(free)} that are free at {runs}")


def memory_line(trial: Trial, measured: Measured, batch_size: int) -> str:
    """One line on peak memory and gradient accumulation."""
    of = "process" if trial.device.type == "cpu" else "device"
    used = f"{readable(measured.peak)} of {readable(memory.total(trial.device))}, {of} memory at its peak"
    steps = trial.share // batch_size
    return f"{used}; data.batch_size={batch_size}, {steps} micro-batch{'es' * (steps > 1)} a step"


def speed_line(measured: Measured, world_size: int) -> str:
    """One line on images per second; with several devices, a multiple of the one measured."""
    line = f"{measured.rate:,.3g} images/s, the median of {len(measured.seconds)} step(s)"
    return line if world_size == 1 else f"{line} of one device, x {world_size} devices if they scale"


def latents_line(autoencoder: FirstStage, data: ImageDataModule) -> str:
    """One line on the disk space of the latents of all training images; flips double it."""
    channels, height, width = latent_shape(autoencoder, data.image_size)
    numbers = math.prod(moments_shape(autoencoder, data.image_size)) * (2 if data.train_set.flip else 1)
    sizes = [readable(data.num_train * numbers * width_of_number) for width_of_number in (4, 2)]
    flipped = ", those of flipped images too" if data.train_set.flip else ""
    return f"{channels} x {height} x {width}; of all images {sizes[0]} in float32, {sizes[1]} in float16{flipped}"


def encoding_line(trial: Trial) -> str:
    """One line on the time to encode the training images that no run has encoded yet.

    Raises:
        UserError: the disk has no room for their latents.
    """
    data, autoencoder = trial.data, trial.module.autoencoder
    cache = latent_cache(autoencoder, data)
    count = sum(len(cache.indices(shard)) for shard in cache.missing())
    if not count:
        return f"done, by an earlier run: {cache.folder}"
    check_room(cache)
    autoencoder.to(trial.device)
    encode, ends, images = Encoder(autoencoder, cache, data.latents_precision), [], []
    for batch in data.training_sample(data.num_train):
        encode(batch["image"])  # returns on the CPU, so it waits for the device
        ends.append(time.perf_counter())
        images.append(len(batch["image"]))
        if len(ends) > 1 and ends[-1] - ends[0] > ENCODING_SECONDS:
            break
    autoencoder.cpu()
    # The first batch also starts loader workers and selects kernels, so a single batch says nothing about time.
    seconds = (ends[-1] - ends[0]) / max(1, sum(images[1:])) * count / trial.world_size
    size = f"{readable(cache.num_bytes(count))} of {cache.dtype} in {cache.folder.parent}"
    size += f", encoded in {data.latents_precision}"
    return f"once, {count:,} images{f' in {duration(seconds)}' if seconds else ''}, {size}"


def on_disk(trial: Trial, measured: Measured, max_images: int, snapshots: int | None) -> int:
    """Bytes of a stage on disk: last and previous checkpoint, a third while it is written, result, snapshots.

    All snapshots share one file of the first stage.
    """
    networks = {name: memory.num_bytes(network.state_dict()) for name, (_, network) in trial.module.exported().items()}
    result = sum(networks.values())
    count = max_images // snapshots if snapshots and trial.module.stage == "diffusion" else 0
    shared = networks["vqvae"]
    averages = getattr(trial.module, "power_ema", None)
    each = result - shared + (memory.num_bytes(averages.state_dict()) if averages else 0)
    return 3 * measured.checkpoint + result + count * each + shared * bool(count)


def millions(parameters: Iterable[nn.Parameter]) -> str:
    """Number of parameters in millions, as text."""
    return f"{sum(parameter.numel() for parameter in parameters) / 1e6:,.1f}"


def duration(seconds: float) -> str:
    """A duration as text, in a suitable unit."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} s"
