"""Pictures that explain a model: how a sample comes about, what lies between two, variations, reconstructions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm_lab.data.decode import EXTENSIONS, PixelLimitError, decode
from ldm_lab.data.transforms import center_crop, resize_to_cover, to_tensor
from ldm_lab.diffusion.denoising import denoise
from ldm_lab.diffusion.noise import randn
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.sampling.generate import image_size
from ldm_lab.sampling.seeds import generators
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.images import grid, save_png, to_uint8, to_unit
from ldm_lab.utils.writing import replacing

STEPS_SHOWN = 10  # of a denoising, in a row
BETWEEN = 12  # frames from one sample to the next
FRAME_MS = 120
VARIATIONS, MOST_RECONSTRUCTED, COLUMNS = 8, 32, 8


@torch.no_grad()
def denoising(pipe: LDMPipeline, count: int, seed: int, steps: int, eta: float = 0.0) -> Tensor:
    """How the first samples come about: what each step takes for the clean image, decoded.

    Args:
        pipe: the model with its sampler.
        count: B, samples.
        seed: of the samples.
        steps: N, of the sampler.
        eta: of the sampler.

    Returns:
        `(F, B, 3, H, W)` in [-1, 1], of F <= `STEPS_SHOWN` steps evenly spread, the last among them.
    """
    own = generators(seed, range(count))
    latents = pipe.noise(count, own)
    pipe.scheduler.set_timesteps(steps)
    shown = {round(place) for place in torch.linspace(0, steps - 1, min(STEPS_SHOWN, steps)).tolist()}
    frames = [
        pipe.decode(output.pred_original_sample).cpu()
        for index, (_, output) in enumerate(denoise(pipe.unet, pipe.scheduler, latents, own, eta))
        if index in shown
    ]
    return torch.stack(frames)  # F x (B, 3, H, W) -> (F, B, 3, H, W)


@torch.no_grad()
def interpolation(
    pipe: LDMPipeline, indices: Sequence[int], seed: int, steps: int, eta: float = 0.0, batch_size: int = 16
) -> Tensor:
    """What lies between samples: all noise goes from that of one to that of the next on a sphere.

    The starting noise does, and the noise of each step where the sampler adds any, so that the ends are these samples.

    Args:
        pipe: the model with its sampler.
        indices: of the samples to go through, two or more.
        seed: of the samples.
        steps: of the sampler.
        eta: of the sampler.
        batch_size: images at a time.

    Returns:
        `(L, F, 3, H, W)` in [-1, 1]: L legs of F frames, each from a sample to the next, both included.
    """
    frames = list(itertools.product(range(len(indices) - 1), torch.linspace(0, 1, BETWEEN).tolist()))
    batches = [frames[first : first + batch_size] for first in range(0, len(frames), batch_size)]
    images = torch.cat([_draw_frames(pipe, indices, batch, seed, steps, eta) for batch in batches])
    return images.unflatten(0, (-1, BETWEEN))  # (L*F, 3, H, W) -> (L, F, 3, H, W)


def _draw_frames(
    pipe: LDMPipeline, indices: Sequence[int], frames: Sequence[tuple[int, float]], seed: int, steps: int, eta: float
) -> Tensor:
    """Frames of an interpolation, each a leg and a part of its way -> `(B, 3, H, W)` in [-1, 1], on the CPU."""
    own = generators(seed, indices)  # new ones: each batch of frames draws the noise of all samples again

    def between(ends: Tensor) -> Tensor:  # (L + 1, C, h, w) -> (B, C, h, w), on the CPU: no step waits for the device
        return torch.stack([slerp(ends[leg], ends[leg + 1], part) for leg, part in frames])

    start = pipe.noise(len(indices), own).cpu()
    latents = between(start).to(pipe.device)
    pipe.scheduler.set_timesteps(steps)
    for _, output in denoise(
        pipe.unet, pipe.scheduler, latents, eta=eta, noise=lambda: between(randn(start.shape, own))
    ):
        latents = output.prev_sample
    return pipe.decode(latents).clamp(-1, 1).cpu()


def slerp(a: Tensor, b: Tensor, part: float) -> Tensor:
    """Spherical interpolation (Shoemake 1985, section 3.3): on the arc from `a` to `b`, of any equal shape.

    Between two draws of normal noise it stays as far from the origin as noise lies; a straight line does not.
    In float64, on the host: not every device has that.
    """
    one, other = a.cpu().double(), b.cpu().double()
    cosine = torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle.sin().abs() < 1e-6:  # one and the same direction, or opposite ones, between which any arc is as good
        return torch.lerp(a, b, part)
    mixed = (torch.sin((1 - part) * angle) * one + torch.sin(part * angle) * other) / angle.sin()
    return mixed.to(a)


@torch.no_grad()
def variations(
    pipe: LDMPipeline, image: Tensor, count: int, strength: float, seed: int, steps: int, eta: float = 0.0
) -> Tensor:
    """Samples that share with an image what noise leaves of it: encode, noise to t, denoise (Meng et al. 2022).

    Args:
        pipe: the model with its sampler.
        image: `(3, H, W)` in [-1, 1].
        count: B.
        strength: the part of the steps that is taken, in (0, 1]: 1 leaves next to nothing of the image.
        seed: variation i follows from (seed, i).
        steps: N, of the sampler; `strength * N` of them are taken.
        eta: of the sampler.

    Returns:
        `(B, 3, H, W)` in [-1, 1].
    """
    vqvae, scheduler = pipe.vqvae, pipe.scheduler
    clean = vqvae.latents(image[None].to(pipe.device, vqvae.dtype)).float() * vqvae.config.scaling_factor
    scheduler.set_timesteps(steps)
    scheduler.set_timesteps(timesteps=scheduler.timesteps[-max(1, round(strength * steps)) :].tolist())
    own = generators(seed, range(count), "variation")
    clean = clean.expand(count, -1, -1, -1)  # (1, C, h, w) -> (B, C, h, w)
    noise = randn(clean.shape, own, pipe.device)
    latents = scheduler.add_noise(clean, noise, scheduler.timesteps[:1].expand(count))
    for _, output in denoise(pipe.unet, scheduler, latents, own, eta):
        latents = output.prev_sample
    return pipe.decode(latents).cpu()


@torch.no_grad()
def reconstructions(vqvae: FirstStage, images: Tensor) -> Tensor:
    """What a first stage makes of `(B, 3, H, W)` images in [-1, 1], one after another, alike."""
    device = next(vqvae.parameters()).device
    made = [vqvae.decode(vqvae.latents(image[None].to(device, vqvae.dtype))).sample for image in images]
    return torch.cat(made).float().cpu()


def read_images(
    source: str | Path, size: tuple[int, int], most: int, key: str, max_pixels: int | None = None
) -> Tensor:
    """The images of a file or a folder (the first by name), resized and cropped as for training: `(B, 3, H, W)`.

    Raises:
        UserError: there are none, or one cannot be read; the message names `key`.
    """
    source = Path(source)
    paths = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not paths:
        raise UserError(f"{key}={source}: no image file, and no folder with images in it")
    tensors = []
    for path in paths[:most]:
        try:
            upright = decode(path.read_bytes(), (255, 255, 255), max_pixels)
        except PixelLimitError as error:
            raise UserError(f"{key}={source}: {path.name}: {error}: max_pixels={error.pixels} takes it") from error
        except Exception as error:  # decoders raise almost anything on damaged data
            raise UserError(f"{key}={source}: {path.name} is not an image that can be read: {error}") from error
        tensors.append(to_tensor(center_crop(resize_to_cover(upright, size), size)))
    return torch.stack(tensors)


def save_sheet(images: Tensor, path: Path, columns: int) -> None:
    """Write `(B, 3, H, W)` images in [-1, 1] as one PNG."""
    save_png(grid(to_uint8(to_unit(images)), columns), path)


def save_animation(frames: Sequence[Tensor], path: Path, columns: int | None = None) -> None:
    """Write frames, each of `(B, 3, H, W)` images in [-1, 1] as a grid, as an animated WebP that begins again."""
    sheets = [grid(to_uint8(to_unit(frame)), columns) for frame in frames]
    lengths = [FRAME_MS] * (len(sheets) - 1) + [10 * FRAME_MS]  # time to look at what has come of it
    with replacing(path) as temporary:
        sheets[0].save(
            temporary, format="WEBP", save_all=True, append_images=sheets[1:], duration=lengths, loop=0, quality=90
        )


@dataclass(frozen=True)
class PictureRequest:
    """Which pictures to write beside samples.

    Attributes:
        denoising: so many samples; 0: none.
        interpolate: indices of samples; fewer than two: none.
        variation: an image file; None: none.
        strength: of the variations.
        reconstruct: an image file or a folder; None: none.
        max_pixels: of an image file; None leaves it to Pillow.
    """

    denoising: int = 0
    interpolate: Sequence[int] = ()
    variation: str | None = None
    strength: float = 0.6
    reconstruct: str | None = None
    max_pixels: int | None = None

    def __bool__(self) -> bool:
        return bool(self.denoising or self.interpolate or self.variation or self.reconstruct)

    def check(self, pipe: LDMPipeline) -> dict[str, Tensor]:
        """The images that are asked for, read before anything is drawn. Raises `UserError` naming the key."""
        given = self.interpolate
        indices = isinstance(given, Sequence) and all(type(index) is int and index >= 0 for index in given)
        if not indices or len(given) == 1:
            raise UserError(f"interpolate={given}: name two samples or more by their numbers, e.g. [3,17]")
        if not isinstance(self.strength, (int, float)) or not 0 < self.strength <= 1:
            raise UserError(f"strength={self.strength}: must lie in (0, 1], the part of the steps that are taken")
        found, most = {}, {"variation": 1, "reconstruct": MOST_RECONSTRUCTED}
        for key, number in most.items():
            if source := getattr(self, key):
                found[key] = read_images(source, image_size(pipe), number, key, self.max_pixels)
        return found

    def write(self, pipe: LDMPipeline, folder: Path, seed: int, steps: int, eta: float) -> list[str]:
        """Draw and write them into `folder`, in the place of earlier ones; returns the files' names."""
        images, written = self.check(pipe), []
        if self.denoising:
            frames = denoising(pipe, self.denoising, seed, steps, eta)  # (F, B, 3, H, W)
            save_sheet(frames.transpose(0, 1).flatten(0, 1), folder / "denoising.png", len(frames))
            save_animation(list(frames), folder / "denoising.webp")
            written += ["denoising.png", "denoising.webp"]
        if self.interpolate:
            legs = interpolation(pipe, self.interpolate, seed, steps, eta)  # (L, F, 3, H, W)
            save_sheet(legs.flatten(0, 1), folder / "interpolation.png", BETWEEN)
            save_animation([frame[None] for frame in legs.flatten(0, 1)], folder / "interpolation.webp")
            written += ["interpolation.png", "interpolation.webp"]
        if self.variation:
            varied = variations(pipe, images["variation"][0], VARIATIONS, self.strength, seed, steps, eta)
            save_sheet(torch.cat([images["variation"], varied]), folder / "variations.png", VARIATIONS + 1)
            written.append("variations.png")
        if self.reconstruct:
            originals = images["reconstruct"]
            rows = zip(originals.split(COLUMNS), reconstructions(pipe.vqvae, originals).split(COLUMNS), strict=True)
            filled = [
                torch.cat([row, row.new_ones(COLUMNS - len(row), *row.shape[1:])]) for pair in rows for row in pair
            ]
            save_sheet(torch.cat(filled), folder / "reconstructions.png", COLUMNS)
            written.append("reconstructions.png")
        return written
