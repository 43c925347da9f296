"""What networks return: attributes by name, and the same values by position as a tuple would have them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ldm_lab.models.gaussian import DiagonalGaussian


class ModelOutput:
    """Base of the result dataclasses: `out.sample`, `out[0]`, `out["sample"]` and `out.to_tuple()`."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are there, in the order of the fields."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: int | slice | str) -> Any:  # noqa: ANN401
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@dataclass
class EncoderOutput(ModelOutput):
    """Latents `(B, C, h, w)`, neither quantized nor scaled."""

    latents: Tensor


@dataclass
class AutoencoderKLOutput(ModelOutput):
    """The distribution of the latents, a Gaussian of mean and variance `(B, C, h, w)`, not scaled."""

    latent_dist: DiagonalGaussian


@dataclass
class DecoderOutput(ModelOutput):
    """Images `(B, C, H, W)`, about in [-1, 1], and the loss of the quantizer (0-dim) where there is one."""

    sample: Tensor
    commit_loss: Tensor | None = None


@dataclass
class UNet2DOutput(ModelOutput):
    """What the UNet predicts, in the shape of its input: noise, clean latents or velocity, as it was trained."""

    sample: Tensor
