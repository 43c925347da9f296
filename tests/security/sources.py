"""Valid models of every kind that can be loaded, for tests to spoil."""

import copy
import functools
import json
import shutil

import torch
import yaml

from ldm_lab import LDMPipeline
from tests.helpers import GOLDEN

FOLDER = GOLDEN / "diffusers/ldm_tiny"
COMPVIS = GOLDEN / "compvis/model.ckpt"
CONFIGS = {"unet": "unet/config.json", "vqvae": "vqvae/config.json", "scheduler": "scheduler/scheduler_config.json"}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
BIN = "unet/diffusion_pytorch_model.bin"


def pipeline(folder):
    """A pipeline folder; returns it."""
    return shutil.copytree(FOLDER, folder / "pipeline", copy_function=shutil.copyfile)


def edit(path, **changes):
    """Change entries of a JSON file; `...` takes one away."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not ...}))


def training_state():
    """What a training checkpoint of stage 2 holds; only the tensors are those of every other one."""
    state = _training_state()
    return {**copy.deepcopy({**state, "state_dict": None}), "state_dict": dict(state["state_dict"])}


@functools.cache
def _training_state():
    prefixes = {"vqvae": "autoencoder.", "unet": "ema.model."}
    parts = {name: json.loads((FOLDER / path).read_text()) for name, path in CONFIGS.items()}
    pipe = LDMPipeline.from_pretrained(FOLDER)
    tensors = {
        prefix + key: value
        for name, prefix in prefixes.items()
        for key, value in getattr(pipe, name).state_dict().items()
    }
    for config in parts.values():
        del config["_diffusers_version"]
    entry = {"stage": "diffusion", "images_seen": 8, "version": "1", "configs": parts, "prefixes": prefixes}
    return {"state_dict": tensors, "optimizer_states": [{"state": {}}], "callbacks": {}, "ldm_lab": entry}


def compvis_state():
    """What a checkpoint of CompVis holds."""
    return torch.load(COMPVIS, weights_only=True)


def compvis_config():
    """The content of its YAML file."""
    meta = json.loads((GOLDEN / "compvis/meta.json").read_text())
    autoencoder = {**meta["arch"]["ckpt_vq"], "lossconfig": {"target": "torch.nn.Identity"}}
    params = {
        **{key: meta["schedule"][key] for key in ("linear_start", "linear_end", "timesteps")},
        "unet_config": {"target": "UNetModel", "params": meta["arch"]["ckpt_unet"]},
        "first_stage_config": {"target": "ldm.models.autoencoder.VQModelInterface", "params": autoencoder},
        "cond_stage_config": "__is_unconditional__",
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def run_folder(folder):
    """The stage 2 of a run that is not finished; returns the stage's folder."""
    stage = folder / "run/diffusion"
    (stage / "checkpoints").mkdir(parents=True)
    torch.save(training_state(), stage / "checkpoints/last.ckpt")
    (stage / "status.json").write_text(json.dumps({"finished": False, "max_images": 64}))
    (stage / "config.yaml").write_text(yaml.safe_dump({"max_images": 64, "model": {"unet": {"dropout": 0.0}}}))
    (stage / "metrics.csv").write_text("images_seen,train/loss\n8,0.5\n16,0.25\n")
    (stage / "wandb_id").write_text("0123456789ab")
    return stage


def put(tree, key, value):
    """Set what is at a dotted key of nested dicts; returns the whole."""
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        node = node[parent]
    node[last] = value
    return tree
