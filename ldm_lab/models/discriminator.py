"""Patch discriminator of the adversarial loss (Isola et al. 2017, pix2pix, arXiv 1611.07004, §3.2.2)."""

from __future__ import annotations

from torch import Tensor, nn

from ldm_lab.models.layout import LaidOut
from ldm_lab.utils.arguments import require_positive


class PatchDiscriminator(LaidOut):
    """PatchGAN: a small convolutional network that classifies each patch of an image as real or generated.

    Layers, names (`main.0.weight`, ...) and initialisation are those of latent diffusion's discriminator.
    The receptive field of a logit is 70 × 70 pixels with three layers, 34 × 34 with two.

    Args:
        in_channels: channels of the images.
        channels: width of the first convolution; each further layer doubles it, up to eight times.
        num_layers: number of convolutions with stride 2.

    Attributes:
        smallest_side: least height and width of the images: one logit.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, channels=channels, num_layers=num_layers)
        self.smallest_side = 3 * 2**num_layers  # two convolutions without stride each take a pixel off the side
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers = [nn.Conv2d(in_channels, channels, kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            # No bias, as the following normalisation removes it.
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], kernel_size=4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, kernel_size=4, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialise)
        self.lay_out()

    def forward(self, images: Tensor) -> Tensor:
        """Logits, positive for real: `(B, C, H, W)` in [-1, 1] -> `(B, 1, h, w)`, 30 × 30 logits for 256 × 256."""
        return self.main(images)


def _initialise(module: nn.Module) -> None:
    """DCGAN initialisation: N(0, 0.02) for convolutions, N(1, 0.02) for the scales of BatchNorm."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, mean=1.0, std=0.02)
