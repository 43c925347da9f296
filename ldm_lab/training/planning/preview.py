"""Previews the training images and their reconstructions before training."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from ldm_lab.data.datamodule import ImageDataModule
from ldm_lab.data.dataset import spread
from ldm_lab.data.images import ImageError
from ldm_lab.data.sampler import StreamBatchSampler
from ldm_lab.metrics.reconstruction import hues_kept, psnr
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.training.latents import latent_shape, posterior_noise
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.images import save_sheet

SAMPLE = 64  # maximum number of images to examine
CROPS, PAIRS = 36, 8  # numbers of images on the sheets
SECONDS = 20.0  # time limit for reconstructing images


def show_images(data: ImageDataModule, sheet: Path) -> None:
    """Print facts on the images, and write the first crops of the training stream, with their flips, to `sheet`.

    Raises:
        UserError: no image can be decoded.
    """
    data.prepare_data()
    print(data.census())
    print(f"  sources     {describe_sizes(source_sizes(data), data.image_size)}")
    order = StreamBatchSampler(data.num_train, data.global_batch_size, 1, data.seed)
    places = range(min(CROPS, data.num_train))
    crops = [data.train_set[order.index(place), place]["image"] for place in places]
    save_sheet(torch.stack(crops), sheet, channels=data.preview_channels)
    print(f"  crops       {sheet}: as the network sees them")


def source_sizes(data: ImageDataModule) -> list[tuple[int, int]]:
    """(width, height) of some training images, before resizing and cropping."""
    sizes = []
    for index in spread(min(SAMPLE, data.num_train), data.num_train):
        try:
            sizes.append(data.train_set.read(index).size)
        except ImageError as error:
            print(f"  unreadable  {error}")
    if not sizes:
        raise UserError(f"data.root: of {SAMPLE} images none can be decoded")
    return sizes


def describe_sizes(sizes: list[tuple[int, int]], image_size: tuple[int, int]) -> str:
    """One line: the range of some (width, height), and how many images are smaller than `image_size`."""
    by_pixels = sorted(sizes, key=lambda size: size[0] * size[1])
    smallest, largest = (f"{width} x {height}" for width, height in (by_pixels[0], by_pixels[-1]))
    height, width = image_size
    small = sum(w < width or h < height for w, h in sizes)
    enlarged = f"{small} are smaller than {width} x {height} and will be enlarged" if small else "none is enlarged"
    return f"{smallest} to {largest} pixels in a sample of {len(sizes)}; {enlarged}"


@torch.inference_mode()
def show_reconstructions(autoencoder: FirstStage, data: ImageDataModule, device: torch.device, sheet: Path) -> None:
    """Print a first stage's PSNR on held-out images and the standard deviation of its latents.

    Writes `sheet`: originals above their reconstructions. A KL first stage draws its latents, as in training.
    """
    autoencoder.to(device)
    shape, start = latent_shape(autoencoder, data.image_size), time.monotonic()
    originals, copies, latents = [], [], []
    for index in spread(min(SAMPLE, data.num_val), data.num_val):
        image = data.val_set[index]["image"][None].to(device)  # (1, C, H, W)
        noise = posterior_noise(autoencoder, data.seed, [index], shape, stream="scale")
        mode = autoencoder.latents(image)  # (1, C, h, w)
        latents.append(mode if noise is None else autoencoder.latents(image, noise.to(device)))
        copies.append(autoencoder.decode(mode).sample.cpu())
        originals.append(image.cpu())
        if time.monotonic() - start > SECONDS:
            break
    autoencoder.cpu()
    pair, std = (torch.cat(copies), torch.cat(originals)), float(torch.cat(latents).cpu().double().std())
    quality = float(psnr(*pair))
    print(f"autoencoder: {type(autoencoder).__name__}, on {len(originals)} held-out image(s)")
    print(f"  quality     {quality:.1f} dB PSNR: {judge(quality)}")
    if data.pixels.channels == 3:
        hues = float(hues_kept(*pair))
        print(f"  colours     {hues:.0%} of the hues are kept{'' if hues >= FAITHFUL else PALE}")
    print(f"  latents     of standard deviation {std:.3g}; model.scaling_factor=measure gives {1 / std:.4g}")
    pairs, columns = torch.cat([*originals[:PAIRS], *copies[:PAIRS]]), min(PAIRS, len(originals))
    save_sheet(pairs, sheet, columns, data.preview_channels)
    print(f"  pictures    {sheet}: originals above their reconstructions")


FAITHFUL = 0.75  # share of the hues; also the doctor's
PALE = ": the others come out grey or wrong, and so will the samples; train stage 1 on these images, or longer"


def judge(quality: float) -> str:
    """A sentence on what a PSNR in dB means for samples. Published, on ImageNet: 27.4 (VQ-f4), 24.2 (KL-f8)."""
    if quality < 24:
        return "below 24 dB fine detail is lost, and diffusion cannot bring it back; train stage 1 on these images"
    if quality < 28:
        return "as published ones on photographs, 24 to 28 dB; small text and fine texture will soften"
    return "above the 24 to 28 dB of published ones on photographs"
