"""Time sampling and its parts, training steps, data loading and start-up, beside diffusers if asked for.

Contestants take turns in one process. Networks have random weights where --ckpt names none: that changes no time.
What is compared with: of sample (from noise to PNG files), forward (of the UNet), decode and encode the namesakes in
diffusers on the same weights, of train its modules with an encode in every step; of data torchvision's ImageFolder; of
import `import torch`. What growth compares is itself: batches of 1 to 64, 10 to 200 steps, decoding 64 to 1024 pixels,
data sets of 10^3 to 10^6 images.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from ldm_lab.models.pretrained import dtype_name
from ldm_lab.tools.benchmark.contest import Contestant, Timing, compare, is_emulated, matmul_peak, measure, row
from ldm_lab.utils import float32
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.version import __version__
from ldm_lab.utils.writing import replacing

MODELS = ("sample", "forward", "decode", "encode", "train", "growth")
KINDS = (*MODELS, "data", "import")
DTYPES = ("float32", "bfloat16")
LAYOUTS = {"innermost": torch.channels_last, "outermost": torch.contiguous_format}


def main(argv: list[str]) -> None:
    """Print one table. Raises `UserError` for invalid flags."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        print(f"skipped: --device {options.device}, but there is no GPU that this torch can use")
        return
    if options.device.type == "cuda":
        float32.allow("high")  # as in training and sampling
    with tempfile.TemporaryDirectory() as folder:
        made = contestants(options, Path(folder))
        timings = measure(made, options.rounds, options.device, options.compile)
    result = report(options, made, timings)
    show(result)
    if options.output:
        with replacing(options.output) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check the flags. Raises `UserError`, which names the flag."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m ldm_lab benchmark", description=__doc__, formatter_class=text)
    parser.add_argument("kind", choices=KINDS, help="what is timed")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the experiment, as for train.py")
    whose = "whose networks and settings (default: celebahq; of growth: avatars)"
    parser.add_argument("--experiment", help=whose)
    parser.add_argument("--ckpt", help="a model that is there, in place of random weights")
    parser.add_argument("--device", type=torch.device, help="default: the GPU where there is one, else the CPU")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of ours (default: %(default)s)")
    of_peer = "of the peer; bfloat16 is autocast (default: %(default)s)"
    parser.add_argument("--peer-dtype", choices=DTYPES, default="float32", help=of_peer)
    parser.add_argument("--compile", action="store_true", help="torch.compile our networks, not the peer's")
    of_channels = "where the channels of our convolutions lie (default: as the networks choose)"
    parser.add_argument("--layout", choices=LAYOUTS, help=of_channels)
    parser.add_argument("--against", choices=("diffusers",), help="time the peer, too (of data: torchvision)")
    parser.add_argument("--batch-size", type=int, default=4, help="images of one run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of sampling (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of a CPU; default: what torch takes")
    parser.add_argument("--workers", type=int, default=2, help="of a loader (default: %(default)s)")
    parser.add_argument("--root", type=Path, help="data: a folder of images; default: drawn JPEGs of 1024x1024")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write all numbers there, too")
    options = parser.parse_intermixed_args(argv)
    for flag in ("batch_size", "steps", "rounds"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(options, flag)}: must be at least 1")
    if options.output and (options.output.exists() or not options.output.parent.is_dir()):
        raise UserError(f"--output {options.output}: must be a new file in a folder that is there")
    if options.kind not in MODELS:
        options.device = torch.device("cpu")
    if options.kind == "growth" and options.against:
        raise UserError("--against diffusers: growth shows our own cost alone")
    options.experiment = options.experiment or ("avatars" if options.kind == "growth" else "celebahq")
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return options


def contestants(options: argparse.Namespace, folder: Path) -> list[Contestant]:
    """Contestants of one comparison, ours first (for `import`: the baseline first). `folder` is for files."""
    against = options.against is not None
    if options.kind not in MODELS:
        from ldm_lab.tools.benchmark import loading

        if options.kind == "import":
            return list(loading.commands(against))
        root = options.root
        if root is None:
            root = folder / "pictures" / "drawn"
            root.mkdir(parents=True)
            loading.draw_pictures(root)
        return loading.loaders(root.absolute(), 256, options.batch_size, options.workers, against)
    from ldm_lab.tools.benchmark import growth, subjects

    pipe, config = subjects.load(options.experiment, options.overrides, options.ckpt, options.device)
    if options.layout:
        for network in (pipe.vqvae, pipe.unet):
            network.layout = LAYOUTS[options.layout]
            network.lay_out()
    dtypes = (getattr(torch, dtype) for dtype in (options.dtype, options.peer_dtype))
    subject = subjects.Subject(pipe, config, options.batch_size, options.steps, *dtypes, against, folder)
    return growth.contestants(subject) if options.kind == "growth" else getattr(subjects, options.kind)(subject)


def report(options: argparse.Namespace, made: list[Contestant], timings: list[Timing]) -> dict[str, Any]:
    """The results as plain data: the machine, a row per contestant, and our ratio to each other contestant."""
    dtypes = dict.fromkeys(one.dtype for one in made if one.dtype)
    peaks = {dtype: matmul_peak(options.device, dtype) for dtype in dtypes}
    flags = {key: str(value) for key, value in vars(options).items() if value is not None}
    rows = [row(one, timing, peaks.get(one.dtype, 0.0)) for one, timing in zip(made, timings, strict=True)]
    ratios = {}
    if options.kind != "growth":  # growth has rows of sizes, not of contestants
        for one, timing in zip(made[1:], timings[1:], strict=True):
            ratios[one.name] = compare(timings[0], timing, made[0].images or 1, one.images or 1)
    found = {"flags": flags, "machine": machine(options.device), "rows": rows, "ratios": ratios}
    found["matmul_flops"] = {dtype_name(dtype): peak for dtype, peak in peaks.items()}
    return {**found, "emulated": [dtype_name(dtype) for dtype in peaks if is_emulated(options.device, dtype)]}


def machine(device: torch.device) -> dict[str, Any]:
    """Facts on the machine that times depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    found = {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    found |= {"python": platform.python_version(), "torch": torch.__version__, "ldm_lab": __version__}
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 1)  # includes other programs
    return found


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    for dtype, peak in result["matmul_flops"].items():
        print(f"matrix products in {dtype}: {peak / 1e9:,.1f} GFLOP/s")
    for dtype in result["emulated"]:
        print(f"this CPU emulates {dtype}: times in it say nothing of processors that have instructions for it")
    width = max(len(line["name"]) for line in result["rows"])
    heads = "images/s  ms (median)     ms (min)       cpu ms   GFLOP/s  of peak  memory GB   run MB  MB/image  overhead"
    print(f"{'':{width}}  {heads}")
    for line in result["rows"]:
        print(
            f"{line['name']:{width}}  {_cell(line['images_per_s'], 8, '.3f')}  {line['ms']:11,.1f}"
            f"  {line['ms_min']:11,.1f}  {line['cpu_ms']:11,.1f}  {_cell(line['gflops'], 8, ',.1f')}"
            f"  {_cell(line['share_of_peak'], 7, '.1%')}  {line['peak_bytes'] / 2**30:9.2f}"
            f"  {line['grown_bytes'] / 2**20:7,.0f}  {_cell(line['mb_per_image'], 8, ',.1f')}"
            f"  {_cell(line.get('overhead'), 8, '.1%')}"
        )
    own = result["rows"][0]["name"]
    for name, found in result["ratios"].items():
        low, high = found["quartiles"]
        print(f"{own} is {found['ratio']:.2f} x as fast as {name} (quartiles {low:.2f}, {high:.2f})", end="")
        if "relative" in found:
            print(f"; largest difference {found['largest_difference']:.2g}, relative {found['relative']:.2g}", end="")
        print()


def _cell(value: float | None, width: int, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"
