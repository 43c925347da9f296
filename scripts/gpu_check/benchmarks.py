"""`python -m ldm_lab benchmark` of the networks of celebahq, beside diffusers where it is installed."""

from __future__ import annotations

import gc
import importlib.util
import json
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from ldm_lab.utils.errors import one_line
from scripts.gpu_check.device import dtypes, torch_device
from scripts.gpu_check.runner import Check, Row

KINDS = ("forward", "decode", "train", "sample", "encode")
LARGE = 60 * 2**30  # bytes of a device that takes batches four times as large


def label(kind: str, compiled: bool, layout: str) -> str:
    """The name of a row of the benchmark."""
    return f"{kind}, {'compiled' if compiled else 'eager'}, channels {layout}"


def benchmark(kinds: Sequence[str], compiled: bool, layout: str, check: Check) -> Iterator[Row]:
    """Kinds of `python -m ldm_lab benchmark`, in one process: imports and the device's start take long.

    A kind that fails is reported, and the next one is measured. No kind is begun in less time than the longest took.
    """
    import torch

    longest = 0.0
    for kind in kinds:
        what, started = label(kind, compiled, layout), time.monotonic()
        if check.left < longest:
            yield {"what": what, "not_run": f"no time left ({check.left:.0f} s)"}
            continue
        try:
            yield {"what": what, **_measured(check, kind, compiled, layout)}
        except Exception as error:
            traceback.print_exc()
            yield {"what": what, "failed": one_line(error)[:300]}
        longest = max(longest, time.monotonic() - started)
        torch.compiler.reset()
        gc.collect()
        if check.device == "cuda":
            torch.cuda.empty_cache()


def _measured(check: Check, kind: str, compiled: bool, layout: str) -> Row:
    """The figures of one kind: ours, and our ratio to diffusers where it is installed."""
    from ldm_lab.tools.benchmark.command import main
    from ldm_lab.training.planning import memory

    device, dtype = torch_device(check), dtypes(check)[-1]
    peer = importlib.util.find_spec("diffusers") is not None
    images = 2 if check.small else 8 * (4 if memory.total(device) > LARGE else 1)
    output = check.work / f"{kind}_{compiled}_{layout}.json"
    words = ["--device", check.device, "--dtype", dtype, "--peer-dtype", dtype, "--layout", layout]
    words += ["--batch-size", str(images), "--output", str(output)]
    words += ["--experiment", "avatars", "debug=tiny"] if check.small else ["--experiment", "celebahq"]
    words += ["--rounds", "2", "--steps", "2"] if check.small else ["--rounds", "7", "--steps", "10"]
    words += ["--compile"] * compiled + ["--against", "diffusers"] * peer
    main([kind, *words])
    found: dict[str, Any] = json.loads(output.read_text())
    own = found["rows"][0]
    row = {key: own[key] for key in ("images_per_s", "share_of_peak", "mb_per_image")}
    notes = {"dtype": dtype, "batch": images, "ms": own["ms"]}
    if not peer:
        return {**row, "notes": notes | {"peer": "diffusers is not installed"}, "details": found}
    (ratio,) = found["ratios"].values()
    low, high = ratio["quartiles"]
    return {
        **row,
        "ratio": ratio["ratio"],
        "notes": notes | {"quartiles": f"{low:.2f} to {high:.2f}"},
        "details": found,
    }
