"""What tests of evaluation share: a request with few samples, and an extractor that is trained in no time."""

from dataclasses import fields
from pathlib import Path

from ldm_lab.tools.evaluate.drawn import Sampling
from ldm_lab.tools.evaluate.evaluate import Request


def request(source, cache, **changes):
    """Twelve samples of two steps, own features, no intervals."""
    sampling = {"num_samples": 12, "sampler": "ddim", "steps": 2, "eta": 0.0, "seed": 0, "batch_size": 5}
    known = {field.name for field in fields(Sampling)}
    sampling |= {key: changes.pop(key) for key in list(changes) if key in known}
    settings = {
        "source": str(source), "data": None, "features": "own", "weights": None, "lpips_weights": None,
        "image_size": None, "num_reference": 50_000, "bootstrap": 5, "cache_dir": Path(cache), "data_cache": None,
        "output": None, "save_reference": None, "accelerator": "cpu", "devices": 1, "num_workers": 0, "plugins": (),
    }  # fmt: skip
    return Request(sampling=Sampling(**sampling), **{**settings, **changes})
