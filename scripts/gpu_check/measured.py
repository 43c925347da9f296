"""Steps of both stages with the networks of the paper, the batch size that fits, and a lack of memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ldm_lab.utils.errors import UserError, one_line
from scripts.gpu_check.device import cores, everyday
from scripts.gpu_check.runner import Check, Row

if TYPE_CHECKING:
    from pathlib import Path

    from ldm_lab.config.compose import DictConfig
    from ldm_lab.training.planning.trial import Trial

STEPS = {"autoencoder": "steps, stage 1 `paper`", "diffusion": "steps, stage 2 `paper`"}
TOO_MANY = 64  # images at a time, for which the memory is made too small
LEFT_CUDA, LEFT_CPU = 4 * 2**30, 2**29  # bytes that they are left


def paper(check: Check, stage: str, *overrides: str) -> DictConfig:
    """The config of a stage with the networks of the paper, at 256 pixels; LPIPS with random weights."""
    from ldm_lab.config.compose import Recipe

    return Recipe.parse([f"experiment=folder/{stage}", *_paper(check, stage), *overrides]).compose()[0]


def _paper(check: Check, stage: str) -> list[str]:
    size = ["debug=tiny", "data.global_batch_size=2"] if check.small else ["data=drawn", "data.image_size=256"]
    workers = 0 if check.small else min(8, cores())
    found = ["model=paper", *size, "data.batch_size=null", f"data.num_workers={workers}", *everyday(check)]
    if stage == "autoencoder":
        target = "ldm_lab.losses.perceptual.LPIPS"
        found.append(f"model.loss.perceptual={{_target_:{target},weights:{random_vgg(check.work / 'vgg.pth')}}}")
    return found


def random_vgg(path: Path) -> Path:
    """A file with random weights for LPIPS, which keep the size of activations: no step is faster on the real ones."""
    import torch
    from torchvision.models import vgg16

    with torch.device("meta"):
        shapes = vgg16().features.state_dict()
    scales = {key: (2 / value[0].numel()) ** 0.5 if value.ndim == 4 else 0.1 for key, value in shapes.items()}
    torch.save({key: scales[key] * torch.randn(value.shape) for key, value in shapes.items()}, path)
    return path


def trial(check: Check, stage: str, *overrides: str) -> Trial:
    """What tries a stage; its first stage, if it needs one, has random weights."""
    from ldm_lab.config import stages
    from ldm_lab.training.planning.trial import Trial
    from ldm_lab.training.quiet import quiet

    quiet()
    autoencoder = None
    if stage == "diffusion":
        autoencoder = stages.networks(paper(check, "autoencoder"), None)["autoencoder"].eval()
    return Trial(*stages.parts(paper(check, stage, *overrides), autoencoder))


def steps(stage: str, check: Check) -> Iterator[Row]:
    """Steps of a stage of the paper's size, in Lightning, with its data, losses and optimizers; as many images as fit.

    Memory an image is what the second half of a batch adds, of a GPU alone: the peak of a CPU's process is too coarse.
    Operations are counted in two steps of their own.
    """
    import torch

    from ldm_lab.tools.benchmark.contest import matmul_peak
    from ldm_lab.training.planning import batch_size

    tried = trial(check, stage)
    images = batch_size.find(tried)
    half = -(-images // 2)
    found = tried.attempt(images, steps=3 if check.small else 20, seconds=15)
    less = tried.run(half, half, steps=2)
    flops = operations(lambda: tried.run(half, half, steps=2)) / (2 * half)  # an image
    dtype = "bfloat16" if str(tried.trainer.precision).startswith("bf16") else "float32"
    notes = {
        "batch": tried.share,
        "at a time": images,
        "precision": tried.trainer.precision,
        "memory GB": found.peak / 2**30,
    }
    notes["GFLOP an image"] = flops / 1e9
    if stage == "autoencoder":
        notes["discriminator"] = "no" if tried.module.loss.discriminator is None else "yes"
    yield {
        "what": STEPS[stage],
        "images_per_s": found.rate,
        "share_of_peak": found.rate * flops / matmul_peak(tried.device, getattr(torch, dtype)),
        "mb_per_image": (found.peak - less.peak) / 2**20 / max(1, images - half) if check.device == "cuda" else None,
        "notes": notes,
        "details": {"seconds": found.seconds, "checkpoint_bytes": found.checkpoint},
    }


def operations(run: Callable[[], object]) -> int:
    """Floating-point operations of `run`, of its backward passes too; of products, convolutions and attention.

    PyTorch's own `FlopCounterMode` also follows modules by hooks, which `autograd.grad` inside a step does not allow.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry, shape_wrapper

    from ldm_lab.tools.benchmark.contest import CPU_ATTENTION

    known = flop_registry | {name: shape_wrapper(count) for name, count in CPU_ATTENTION.items()}

    class Counter(TorchDispatchMode):
        flops = 0

        def __torch_dispatch__(
            self,
            func: Callable,
            types: Sequence[type],
            args: tuple = (),
            kwargs: dict | None = None,
        ) -> object:
            output = func(*args, **(kwargs or {}))
            if count := known.get(func._overloadpacket):
                self.flops += count(*args, **(kwargs or {}), out_val=output)
            return output

    with Counter() as counter:
        run()
    return counter.flops


def auto(check: Check) -> Iterator[Row]:
    """`data.batch_size=auto` of stage 2, for a global batch too large for most cards; then steps of the size found."""
    from ldm_lab.training.planning import batch_size, memory

    wanted = 8 if check.small else 512
    tried = trial(check, "diffusion", f"data.global_batch_size={wanted}")
    started = time.monotonic()
    found = batch_size.find(tried)
    seconds = time.monotonic() - started
    peak = tried.run(found, found, steps=2).peak
    there = memory.total(tried.device) / 2**30
    notes = {"found": found, "of": wanted, "memory GB": peak / 2**30, "of GB": there}
    yield {"what": "data.batch_size=auto", "seconds": seconds, "notes": notes}


def out_of_memory(check: Check) -> Iterator[Row]:
    """Stage 1 with less memory than it needs has to end with the line that names the key, not with a traceback."""
    from train import job

    sizes = [f"data.global_batch_size={TOO_MANY}", f"data.batch_size={TOO_MANY}", "data.image_size=256"]
    command = ["experiment=folder/autoencoder", *_paper(check, "autoencoder"), *sizes, "name=out_of_memory"]
    limit_memory(check)
    try:
        job([*command, "data.num_workers=0"])
    except UserError as error:
        message = one_line(error)
    else:
        raise RuntimeError(f"{TOO_MANY} images at a time were to run out of memory, and did not")
    row = {"what": "out of memory", "notes": {"message": message}}
    expected = f"data.batch_size={TOO_MANY} is too much for the device: use {TOO_MANY // 2}"
    yield row if expected in message else row | {"failed": f"the message does not say: {expected}"}


def limit_memory(check: Check) -> None:
    """Leave this process little memory: of a GPU by its allocator's share, of a CPU by the system's limit."""
    import torch

    from ldm_lab.config import stages  # noqa: F401  # before the limit: imports need memory
    from ldm_lab.training.planning import memory

    if check.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(LEFT_CUDA / memory.total(torch.device("cuda", 0)), 0)
        return
    import resource

    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (used + LEFT_CPU, resource.getrlimit(resource.RLIMIT_AS)[1]))
