"""Evaluates a first stage alone by its reconstructions of held-out images."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import Trainer
from torch import Tensor, nn

from ldm_lab.losses.perceptual import LPIPS
from ldm_lab.metrics import distribution
from ldm_lab.metrics.extractors import Extractor
from ldm_lab.metrics.images import Pixels, like, to_networks
from ldm_lab.metrics.reconstruction import psnr, ssim
from ldm_lab.metrics.reference import Reference, header
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.tools.evaluate.evaluator import exact_device
from ldm_lab.tools.evaluate.rows import rows
from ldm_lab.tools.evaluate.scores import Scores, compare
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.reading import LoadError, first_bytes, kind_of


def reconstructions(
    autoencoder: FirstStage, extractor: Extractor, lpips: LPIPS | None, images: Pixels, trainer: Trainer, draws: int
) -> tuple[Scores, Reference]:
    """Metrics of reconstructions against their originals.

    The Fréchet distance is between both sets (`rfid` for Inception); PSNR, SSIM and LPIPS are means over images.

    Args:
        autoencoder: the first stage; a KL first stage uses the mode of its latents.
        extractor: for the Fréchet distance.
        lpips: the perceptual distance; `None` skips it.
        images: held-out images.
        trainer: distributes the work over its devices.
        draws: replicates of the bootstrap.

    Returns:
        The metrics, and the originals as reference.
    """
    size = extractor.dimension

    def judge(originals: Tensor) -> Tensor:
        """`(B, C, H, W)` -> features of originals and reconstructions, PSNR, SSIM, LPIPS: `(B, 2D + 3)`."""
        target = to_networks(originals)
        copies = autoencoder.decode(autoencoder.latents(target)).sample.float()
        shown = like(copies, originals.dtype)
        pairs = list(zip(copies.split(1), target.split(1), strict=True))
        each = [torch.stack([measure(*pair) for pair in pairs]) for measure in (psnr, ssim)]  # (B,) each
        each.append(target.new_zeros(len(target)) if lpips is None else lpips(copies.clamp(-1, 1), target))
        return torch.cat([extractor(originals), extractor(shown), torch.stack(each, 1)], 1)

    networks = nn.ModuleList([autoencoder, extractor])
    found = rows(trainer, networks, images, judge, 2 * size + 3).to(exact_device(trainer))
    reference = Reference(header(images, extractor), found[:, :size])
    distance = "rfid" if extractor.distance == "fid" else extractor.distance
    scores = {distance: compare(found[:, size : 2 * size], reference, distance, draws)[distance]}
    for place, name in enumerate(("psnr", "ssim", "lpips"), start=2 * size):
        if name != "lpips" or lpips is not None:
            scores[name] = distribution.mean(found[:, place], draws)
    return scores, reference


def perceptual(weights: str | None, channels: int = 3) -> LPIPS | None:
    """LPIPS; `None` with a warning if its weights are not available. Raises `LoadError` for a file of other weights.

    Args:
        weights: file of torchvision's VGG16; None: from torch's hub.
        channels: channels of the images; `None` with a line where LPIPS does not see them.
    """
    if channels not in (1, 3):
        print(f"lpips is left out: it sees RGB or grey, not {channels} channels", flush=True)
        return None
    distance = LPIPS(weights)
    try:
        distance.setup()
    except UserError as error:
        if weights:
            kind = kind_of(first_bytes(Path(weights)))
            what = f"this is {kind}" if kind else "no weights of torchvision's VGG16"
            raise LoadError(f"--lpips-weights {weights}: {what}") from error
        print("lpips is left out: torchvision's VGG16 cannot be had; --lpips-weights vgg16-397923af.pth", flush=True)
        return None
    return distance
