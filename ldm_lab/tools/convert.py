"""Write a pipeline folder from a run, a checkpoint, a file of CompVis/latent-diffusion or a name on the hub."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ldm_lab.diffusion.flow import FlowScheduler
from ldm_lab.diffusion.process import Process
from ldm_lab.models.autoencoders import load_autoencoder
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.models.pretrained import PretrainedModel, dtype_name
from ldm_lab.models.unet import UNet2DModel
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.utils.errors import UserError

DTYPES = ("float32", "float16", "bfloat16")


def parser() -> argparse.ArgumentParser:
    """The tool's argument parser."""
    parser = argparse.ArgumentParser(prog="python -m ldm_lab convert", description=__doc__)
    parser.add_argument("source", help="run folder, its snapshot (runs/x@2M), checkpoint, pipeline folder, hub name")
    parser.add_argument("target", type=Path, help="folder to write; must not exist, or be empty")
    parser.add_argument("--original-config", help="YAML file of a CompVis checkpoint; without it, the one beside it")
    parser.add_argument("--raw", action="store_true", help="of a CompVis checkpoint, the weights, not their average")
    parser.add_argument("--first-stage", action="store_true", help="write the autoencoder alone")
    parser.add_argument("--dtype", choices=DTYPES, help="floating-point type of the weights; default: as they are")
    parser.add_argument("--plugins", nargs="*", default=[], help="packages whose classes the model may name")
    return parser


def main(argv: list[str]) -> None:
    """Convert the model and print its description."""
    arguments = parser().parse_args(argv)
    source, target = arguments.source, arguments.target
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} is there already: name a folder that is not, or is empty")
    model = load(arguments)
    if arguments.dtype:
        model.to(dtype=getattr(torch, arguments.dtype))
    print(source)
    for line in describe(model):
        print(f"  {line}")
    model.save_pretrained(target)
    print(f"written to {target}")


def load(arguments: argparse.Namespace) -> LDMPipeline | FirstStage:
    """The model that the arguments name."""
    of_compvis = arguments.original_config or arguments.raw
    if arguments.first_stage and of_compvis:
        raise UserError("--first-stage needs neither --original-config nor --raw: its tensors tell all there is")
    if arguments.first_stage:
        return load_autoencoder(arguments.source, arguments.plugins)
    if of_compvis:
        return LDMPipeline.from_single_file(arguments.source, arguments.original_config, use_ema=not arguments.raw)
    return LDMPipeline.from_pretrained(arguments.source, plugins=arguments.plugins)


def describe(model: LDMPipeline | FirstStage) -> list[str]:
    """One line for each part."""
    if isinstance(model, FirstStage):
        return [f"autoencoder  {describe_first_stage(model)}"]
    return [
        f"vqvae      {describe_first_stage(model.vqvae)}",
        f"unet       {describe_unet(model.unet)}",
        f"scheduler  {describe_scheduler(model.scheduler)}",
    ]


def describe_first_stage(model: FirstStage) -> str:
    """One line: class, size, compression, scale."""
    codes = f", {model.config.num_vq_embeddings} codes" if "num_vq_embeddings" in model.config else ""
    shape = f"f = {model.downsample_factor}, {model.embed_dim} channels{codes}"
    return f"{_size(model)}, {shape}, scaling_factor {model.config.scaling_factor:.6g}"


def describe_unet(model: UNet2DModel) -> str:
    """One line: class, size, latents, heads."""
    config = model.config
    size = config.sample_size
    latents = "open" if size is None else " x ".join(map(str, [size, size] if isinstance(size, int) else size))
    heads = config.get("num_attention_heads")
    heads = f"{heads} heads" if heads else f"heads of {config.attention_head_dim} channels"
    return f"{_size(model)}, latents of {config.in_channels} channels, {latents}, attention with {heads}"


def describe_scheduler(scheduler: Process) -> str:
    """One line: class, betas, prediction type; of flow matching the shift."""
    config = scheduler.config
    if isinstance(scheduler, FlowScheduler):
        return f"{type(scheduler).__name__}, {config.num_train_timesteps} timesteps, shift {config.shift:.6g}"
    listed = config.trained_betas is not None
    betas = "betas listed" if listed else f"{config.beta_schedule} {config.beta_start:.6g} to {config.beta_end:.6g}"
    return f"{type(scheduler).__name__}, {config.num_train_timesteps} timesteps, {betas}, {config.prediction_type}"


def _size(model: PretrainedModel) -> str:
    return f"{type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters in {dtype_name(model.dtype)}"
