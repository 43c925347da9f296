"""Pictures that explain a model: denoising, interpolations, variations, reconstructions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm_lab.data.decoding.arrays import NPY_FILES
from ldm_lab.data.decoding.pictures import EXTENSIONS, PixelLimitError
from ldm_lab.data.decoding.reader import PixelReader
from ldm_lab.data.transforms import center_crop, resize_to_cover, to_tensor
from ldm_lab.diffusion.denoising import denoise
from ldm_lab.diffusion.guidance import NO_GUIDANCE, Guidance
from ldm_lab.diffusion.noise import randn
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.sampling.generate import image_size
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.images import require_shown, save_sheet, sheet
from ldm_lab.utils.pixels import RGB_8_BIT, PixelFormat
from ldm_lab.utils.randomness import generators
from ldm_lab.utils.writing import replacing

STEPS_SHOWN = 10  # maximum number of steps shown of a denoising
BETWEEN = 12  # frames per leg of an interpolation
FRAME_MS = 120
VARIATIONS, MOST_RECONSTRUCTED, COLUMNS = 8, 32, 8


@torch.no_grad()
def denoising(
    pipe: LDMPipeline,
    indices: Sequence[int],
    seed: int,
    steps: int,
    eta: float = 0.0,
    most: int = STEPS_SHOWN,
    guidance: Guidance = NO_GUIDANCE,
) -> Tensor:
    """The denoising of samples: the predicted clean image at each step, decoded.

    Args:
        pipe: the model with its sampler.
        indices: indices of B samples.
        seed: seed of the samples.
        steps: N, steps of the sampler.
        eta: eta of the sampler.
        most: maximum number of steps to show.
        guidance: how the guide of `pipe` acts.

    Returns:
        `(F, B, C, H, W)` in [-1, 1], on the device, for F <= `most` evenly spaced steps, the last included.
    """
    rngs = generators(seed, indices)
    latents = pipe.noise(len(indices), rngs)
    pipe.scheduler.set_timesteps(steps)
    network = pipe.denoiser(guidance)
    shown = {round(place) for place in torch.linspace(0, steps - 1, min(most, steps)).tolist()}
    frames = [
        pipe.decode(output.pred_original_sample)
        for index, (_, output) in enumerate(denoise(network, pipe.scheduler, latents, rngs, eta))
        if index in shown
    ]
    return torch.stack(frames)  # F x (B, C, H, W) -> (F, B, C, H, W)


@torch.no_grad()
def interpolation(
    pipe: LDMPipeline,
    indices: Sequence[int],
    seed: int,
    steps: int,
    eta: float = 0.0,
    batch_size: int = 16,
    guidance: Guidance = NO_GUIDANCE,
) -> Tensor:
    """Interpolation between samples: spherical interpolation of all noise from one sample to the next.

    It interpolates the starting noise and any noise that the sampler adds in a step, so the ends are these samples.

    Args:
        pipe: the model with its sampler.
        indices: indices of two or more samples, in order.
        seed: seed of the samples.
        steps: steps of the sampler.
        eta: eta of the sampler.
        batch_size: images at a time.
        guidance: how the guide of `pipe` acts.

    Returns:
        `(L, F, C, H, W)` in [-1, 1]: L legs of F frames, each from a sample to the next, ends included.
    """
    frames = list(itertools.product(range(len(indices) - 1), torch.linspace(0, 1, BETWEEN).tolist()))
    batches = [frames[first : first + batch_size] for first in range(0, len(frames), batch_size)]
    images = torch.cat([_draw_frames(pipe, indices, batch, seed, steps, eta, guidance) for batch in batches])
    return images.unflatten(0, (-1, BETWEEN))  # (L*F, C, H, W) -> (L, F, C, H, W)


def _draw_frames(
    pipe: LDMPipeline,
    indices: Sequence[int],
    frames: Sequence[tuple[int, float]],
    seed: int,
    steps: int,
    eta: float,
    guidance: Guidance,
) -> Tensor:
    """Frames of an interpolation, as (leg, fraction) pairs -> `(B, C, H, W)` in [-1, 1], on the CPU."""
    rngs = generators(seed, indices)  # new for each batch of frames, which draws the same noise

    def between(ends: Tensor) -> Tensor:  # (L + 1, C, h, w) -> (B, C, h, w), on the CPU: no step waits for the device
        return torch.stack([slerp(ends[leg], ends[leg + 1], part) for leg, part in frames])

    start = pipe.noise(len(indices), rngs).cpu()
    latents = between(start).to(pipe.device)
    pipe.scheduler.set_timesteps(steps)
    network, noise = pipe.denoiser(guidance), lambda: between(randn(start.shape, rngs))
    for _, output in denoise(network, pipe.scheduler, latents, eta=eta, noise=noise):
        latents = output.prev_sample
    return pipe.decode(latents).clamp(-1, 1).cpu()


def slerp(a: Tensor, b: Tensor, part: float) -> Tensor:
    """Spherical interpolation (Shoemake 1985, section 3.3) from `a` to `b`, of any equal shape.

    Between two draws of normal noise it keeps the norm of noise; linear interpolation does not. It computes in
    float64 on the CPU, as not every device has float64.
    """
    one, other = a.cpu().double(), b.cpu().double()
    cosine = torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle.sin().abs() < 1e-6:  # equal directions, or opposite ones, where the arc is not unique
        return torch.lerp(a, b, part)
    mixed = (torch.sin((1 - part) * angle) * one + torch.sin(part * angle) * other) / angle.sin()
    return mixed.to(a)


@torch.no_grad()
def variations(
    pipe: LDMPipeline,
    image: Tensor,
    count: int,
    strength: float,
    seed: int,
    steps: int,
    eta: float = 0.0,
    guidance: Guidance = NO_GUIDANCE,
) -> Tensor:
    """Variations of an image by SDEdit (Meng et al. 2022): encode, add noise up to t, denoise.

    Args:
        pipe: the model with its sampler.
        image: `(C, H, W)` in [-1, 1].
        count: B, number of variations.
        strength: fraction of the steps to take, in (0, 1]; 1 keeps next to nothing of the image.
        seed: variation i is a function of (seed, i).
        steps: N, steps of the sampler; it takes `strength * N` of them.
        eta: eta of the sampler.
        guidance: how the guide of `pipe` acts.

    Returns:
        `(B, C, H, W)` in [-1, 1].
    """
    vqvae, scheduler = pipe.vqvae, pipe.scheduler
    clean = vqvae.latents(image[None].to(pipe.device, vqvae.dtype)).float() * vqvae.config.scaling_factor
    scheduler.set_timesteps(steps)
    scheduler.set_timesteps(timesteps=scheduler.timesteps[-max(1, round(strength * steps)) :].tolist())
    rngs = generators(seed, range(count), "variation")
    clean = clean.expand(count, -1, -1, -1)  # (1, C, h, w) -> (B, C, h, w)
    noise = randn(clean.shape, rngs, pipe.device)
    latents = scheduler.add_noise(clean, noise, scheduler.timesteps[:1].expand(count))
    for _, output in denoise(pipe.denoiser(guidance), scheduler, latents, rngs, eta):
        latents = output.prev_sample
    return pipe.decode(latents).cpu()


@torch.no_grad()
def reconstructions(vqvae: FirstStage, images: Tensor) -> Tensor:
    """Reconstructions `(B, C, H, W)` of images `(B, C, H, W)` in [-1, 1], one image at a time."""
    device = next(vqvae.parameters()).device
    made = [vqvae.decode(vqvae.latents(image[None].to(device, vqvae.dtype))).sample for image in images]
    return torch.cat(made).float().cpu()


def read_images(
    source: str | Path,
    size: tuple[int, int],
    most: int,
    key: str,
    max_pixels: int | None = None,
    pixels: PixelFormat = RGB_8_BIT,
) -> Tensor:
    """The image of a file, or the first `most` images of a folder, cropped as in validation: `(B, C, H, W)`.

    Raises:
        UserError: there is no image, or an image cannot be read; the message names `key`.
    """
    source, known = Path(source), (*EXTENSIONS, *NPY_FILES)
    paths = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.suffix.lower() in known)
    if not paths:
        raise UserError(f"{key}={source}: no image file, and no folder with images in it")
    values = None if pixels.is_picture else pixels.value_range
    reader, tensors = PixelReader(pixels.channels, values, (255, 255, 255), max_pixels), []
    for path in paths[:most]:
        try:
            upright = reader.image(path.read_bytes(), pixels)
        except PixelLimitError as error:
            raise UserError(f"{key}={source}: {path.name}: {error}: max_pixels={error.pixels} takes it") from error
        except Exception as error:  # decoders raise almost anything on corrupt data
            raise UserError(f"{key}={source}: {path.name} is not an image that can be read: {error}") from error
        tensors.append(to_tensor(center_crop(resize_to_cover(upright, size), size)))
    return torch.stack(tensors)


def save_animation(frames: Sequence[Tensor], path: Path, channels: Sequence[int] | None = None) -> None:
    """Write frames, each a grid of `(B, C, H, W)` images in [-1, 1], as a looping animated WebP."""
    sheets = [sheet(frame, channels=channels) for frame in frames]
    lengths = [FRAME_MS] * (len(sheets) - 1) + [10 * FRAME_MS]  # show the result longer
    with replacing(path) as temporary:
        sheets[0].save(
            temporary, format="WEBP", save_all=True, append_images=sheets[1:], duration=lengths, loop=0, quality=90
        )


@dataclass(frozen=True)
class PictureRequest:
    """The pictures to write beside samples.

    Attributes:
        denoising: number of samples whose denoising to show; 0: none.
        interpolate: indices of samples to interpolate; fewer than two: none.
        variation: image file to vary; None: none.
        strength: strength of the variations.
        reconstruct: image file or folder to reconstruct; None: none.
        max_pixels: maximum pixels of an image file; None: Pillow's limit.
        preview_channels: channels to show, one or three; None: the first three, or the first.
    """

    denoising: int = 0
    interpolate: Sequence[int] = ()
    variation: str | None = None
    strength: float = 0.6
    reconstruct: str | None = None
    max_pixels: int | None = None
    preview_channels: Sequence[int] | None = None

    def __bool__(self) -> bool:
        return bool(self.denoising or self.interpolate or self.variation or self.reconstruct)

    def check(self, pipe: LDMPipeline) -> dict[str, Tensor]:
        """Read the requested images before sampling starts. Raises `UserError`, which names the key."""
        given = self.interpolate
        indices = isinstance(given, Sequence) and all(type(index) is int and index >= 0 for index in given)
        if not indices or len(given) == 1:
            raise UserError(f"interpolate={given}: name two samples or more by their numbers, e.g. [3,17]")
        if not isinstance(self.strength, (int, float)) or not 0 < self.strength <= 1:
            raise UserError(f"strength={self.strength}: must lie in (0, 1], the part of the steps that are taken")
        require_shown(self.preview_channels, pipe.vqvae.config.out_channels, "preview_channels")
        found, most = {}, {"variation": 1, "reconstruct": MOST_RECONSTRUCTED}
        for key, number in most.items():
            if source := getattr(self, key):
                found[key] = read_images(source, image_size(pipe), number, key, self.max_pixels, pipe.vqvae.pixels)
        return found

    def write(
        self, pipe: LDMPipeline, folder: Path, seed: int, steps: int, eta: float, guidance: Guidance = NO_GUIDANCE
    ) -> list[str]:
        """Make the pictures and write them into `folder`, over earlier ones; returns the file names."""
        images, written, shown = self.check(pipe), [], self.preview_channels
        if self.denoising:
            frames = denoising(pipe, range(self.denoising), seed, steps, eta, guidance=guidance)  # (F, B, C, H, W)
            save_sheet(frames.transpose(0, 1).flatten(0, 1), folder / "denoising.png", len(frames), shown)
            save_animation(list(frames), folder / "denoising.webp", shown)
            written += ["denoising.png", "denoising.webp"]
        if self.interpolate:
            legs = interpolation(pipe, self.interpolate, seed, steps, eta, guidance=guidance)  # (L, F, C, H, W)
            save_sheet(legs.flatten(0, 1), folder / "interpolation.png", BETWEEN, shown)
            save_animation([frame[None] for frame in legs.flatten(0, 1)], folder / "interpolation.webp", shown)
            written += ["interpolation.png", "interpolation.webp"]
        if self.variation:
            varied = variations(pipe, images["variation"][0], VARIATIONS, self.strength, seed, steps, eta, guidance)
            save_sheet(torch.cat([images["variation"], varied]), folder / "variations.png", VARIATIONS + 1, shown)
            written.append("variations.png")
        if self.reconstruct:
            originals = images["reconstruct"]
            rows = zip(originals.split(COLUMNS), reconstructions(pipe.vqvae, originals).split(COLUMNS), strict=True)
            filled = [
                torch.cat([row, row.new_ones(COLUMNS - len(row), *row.shape[1:])]) for pair in rows for row in pair
            ]
            save_sheet(torch.cat(filled), folder / "reconstructions.png", COLUMNS, shown)
            written.append("reconstructions.png")
        return written
