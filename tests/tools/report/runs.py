"""Folders as runs leave them, written in milliseconds."""

import json

import numpy as np
import yaml
from PIL import Image

DATA = {"image_size": 8, "module": {"val_set": {"_target_": "ldm_lab.data.images.FolderImages", "image_size": 8}}}
OBJECTIVE = {
    "loss": {"_target_": "ldm_lab.diffusion.objective.L2Loss"},
    "weighting": {"_target_": "ldm_lab.diffusion.objective.PlainWeighting"},
}
MODEL = {"objective": OBJECTIVE, "scheduler": {"prediction_type": "epsilon"}, "optimizer": {"lr": 1e-4}}


def write_stage(folder, stage="diffusion", rows=None, marks=(1, 2), **settings):
    """`rows`: images seen -> metrics. `settings` go into the config."""
    folder.mkdir(parents=True)
    config = {"name": folder.parent.name, "stage": stage, "max_images": 20, "data": DATA, "model": MODEL} | settings
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    if rows:
        names = sorted({name for row in rows.values() for name in row})
        lines = [[images, *(row.get(name, "") for name in names)] for images, row in rows.items()]
        text = "\n".join(",".join(map(str, line)) for line in [["images_seen", *names], *lines])
        (folder / "metrics.csv").write_text(text + "\n", encoding="utf-8")
    if marks:
        np.savez(folder / "data.npz", train=np.array(marks, "<u4"), val=np.array(marks, "<u4"))
    return folder


def write_run(folder, loss=(0.5, 0.25), **more):
    """A run with one stage, validated at 10 and 20 images."""
    rows = {images: {"val/loss": value} for images, value in zip((10, 20), loss, strict=True)}
    write_stage(folder / "diffusion", rows=rows, **more)
    return folder


def write_picture(stage, name, images, colour=(200, 30, 30), size=(16, 16)):
    (stage / "samples").mkdir(exist_ok=True)
    path = stage / "samples" / f"{name}_{images:09d}.png"
    Image.new("RGB", size, colour).save(path)
    return path


def write_evaluation(run, metrics, name="fid", images_seen=20, **more):
    """`metrics`: name -> value, or (value, low, high)."""
    (run / "eval").mkdir(exist_ok=True)
    found = {
        key: dict(zip(("value", "low", "high"), value if isinstance(value, tuple) else (value,), strict=False))
        for key, value in metrics.items()
    }
    content = {
        "format": 1, "kind": "samples", "images_seen": images_seen, "num_samples": 100,
        "sampling": {"sampler": "ddim", "steps": 20, "eta": 0.0, "seed": 0},
        "extractor": {"name": "inception", "fingerprint": "a"}, "reference": {"source": "x", "fingerprint": "r"},
    }  # fmt: skip
    path = run / "eval" / f"{name}.json"
    path.write_text(json.dumps(content | more | {"metrics": found}))
    return path
