"""The parts of a check in their order: what is most worth knowing comes first, as the time may not suffice for all."""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from scripts.gpu_check import benchmarks, device, measured
from scripts.gpu_check.runner import Check, Part, Row

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "torchvision", "lightning", "diffusers")
DEMO = {"autoencoder": "demo, stage 1", "diffusion": "demo, stage 2"}


def machine(check: Check) -> Iterator[Row]:
    """What was measured on, and how fast its matrix products are. Raises `ValueError` where there is no GPU."""
    import torch

    from ldm_lab.tools.benchmark.contest import matmul_peak

    gpu = device.torch_device(check)
    facts = {"commit": _said_by("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")}
    if check.device == "cuda":
        properties = torch.cuda.get_device_properties(gpu)
        facts["GPU"] = f"{properties.name} ({properties.total_memory / 2**30:.0f} GB)"
        facts["driver"] = _said_by("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["CUDA"] = torch.version.cuda or f"ROCm {torch.version.hip}"
        facts["cuDNN"] = str(torch.backends.cudnn.version())
    facts |= {"cores": str(device.cores()), "Python": platform.python_version()}
    yield {"what": "machine", "notes": facts | {name: _version(name) for name in LIBRARIES}}
    for name in device.dtypes(check):
        yield {"what": f"matrix products, {name}", "notes": {"TFLOP/s": matmul_peak(gpu, getattr(torch, name)) / 1e12}}


def _said_by(*command: str) -> str:
    """The output of a command; "unknown" where there is no such command, or it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which(command[0]) else None
    return done.stdout.strip() if done and not done.returncode else "unknown"


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def tests(check: Check) -> Iterator[Row]:
    """The tests marked `gpu`; only their files are imported, as others need libraries that may not be there."""
    try:
        import pytest
    except ImportError:
        yield {"what": "tests marked gpu", "not_run": "pytest is not installed"}
        return
    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    found = check.work / "tests.xml"
    where = ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    pytest.main([*marked, "-m", "gpu", "--continue-on-collection-errors", f"--junitxml={found}", *where])
    cases = list(ElementTree.parse(found).getroot().iter("testcase"))
    bad = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(bad) - skipped
    row = {"what": "tests marked gpu", "notes": {"passed": passed, "failed": len(bad), "skipped": skipped}}
    yield row | ({"failed": "; ".join(map(str, bad))} if bad else {})


def demo(check: Check) -> Iterator[Row]:
    """Both stages of `python train.py`: seconds of training, the speed, and the metrics of the last validation."""
    from ldm_lab.runs.record import StageRecord
    from train import job

    for stage, what in DEMO.items():
        small = ["debug=tiny"] if check.small else []
        job([f"experiment=avatars/{stage}", *small, *device.everyday(check)])
        record = StageRecord(check.work / "runs" / "avatars" / stage, stage)
        last = {key: curve[-1][1] for key, curve in record.curves.items() if curve}
        notes = {key: value for key, value in record.status.items() if "/" in key}
        yield {
            "what": what,
            "seconds": 3600 * last["perf/device_hours"],
            "images_per_s": last["perf/images_per_second"],
            "notes": notes | {"memory GB": last["perf/memory_gb"]},
        }


def samples(check: Check) -> Iterator[Row]:
    """`python sample.py` of the demo; its grid is kept as `samples.png`."""
    from sample import job

    folder, started, count = check.work / "samples", time.monotonic(), 4 if check.small else 64
    settings = [f"num_samples={count}", f"trainer={device.trainer(check)}", f"output={folder}"]
    job([f"ckpt={check.work / 'runs' / 'avatars'}", *settings])
    seconds = time.monotonic() - started
    shutil.copyfile(folder / "grid.png", check.out / "samples.png")
    yield {"what": "demo, samples", "seconds": seconds, "notes": {"images": count, "grid": "samples.png"}}


def parts(small: bool) -> tuple[Part, ...]:
    """All of them. Of the benchmark, small ones run each kind and each form once, not each kind in each form."""
    forms = [(compiled, layout) for compiled in (False, True) for layout in ("innermost", "outermost")]
    kinds = dict.fromkeys(forms, benchmarks.KINDS)
    if small:
        kinds = {(False, "innermost"): benchmarks.KINDS, (True, "outermost"): ("encode",)}
    return (
        Part("machine", machine, ("machine", "matrix products, float32"), 90),
        Part("tests", tests, ("tests marked gpu",), 180, 15),
        Part("demo", demo, tuple(DEMO.values()), 240, 60),
        Part("samples", samples, ("demo, samples",), 60, 15),
        *(
            Part(f"stage_{number}", functools.partial(measured.steps, stage), (what,), 90, 20)
            for number, (stage, what) in enumerate(measured.STEPS.items(), start=1)
        ),
        Part("auto", measured.auto, ("data.batch_size=auto",), 90, 20),
        Part("out_of_memory", measured.out_of_memory, ("out of memory",), 60, 15),
        *(_benchmark(*form, its) for form, its in kinds.items()),
    )


def _benchmark(compiled: bool, layout: str, kinds: tuple[str, ...]) -> Part:
    name = f"benchmark_{'compiled' if compiled else 'eager'}_{layout}"
    rows = tuple(benchmarks.label(kind, compiled, layout) for kind in kinds)
    run = functools.partial(benchmarks.benchmark, kinds, compiled, layout)
    return Part(name, run, rows, limit=240 if compiled else 120, least=20)
