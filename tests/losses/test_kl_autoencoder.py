"""The loss of KL autoencoders against the formulas of the original, written out once more."""

import pytest
import torch
from torch import nn

from ldm_lab.losses.adversarial import AdversarialTerm
from ldm_lab.losses.autoencoder import AutoencoderLoss, KLAutoencoderLoss
from ldm_lab.losses.perceptual import MultiScaleL1
from ldm_lab.models.discriminator import PatchDiscriminator
from ldm_lab.models.outputs import DiagonalGaussian
from tests.helpers import assert_close_relative

KL_WEIGHT, DISC_WEIGHT = 0.01, 0.5


class Autoencoder(nn.Module):
    """The smallest KL autoencoder, with its loss as a LightningModule would hold it."""

    def __init__(self, discriminator=True, **adversarial):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Conv2d(3, 8, 3, padding=1)
        self.decoder = nn.Conv2d(4, 3, 3, padding=1)
        critic = PatchDiscriminator(channels=4, num_layers=2) if discriminator else None
        term = AdversarialTerm(weight=DISC_WEIGHT, **adversarial)
        self.loss = KLAutoencoderLoss(MultiScaleL1(), critic, term, kl_weight=KL_WEIGHT)

    def reconstruct(self, images):
        posterior = DiagonalGaussian(self.encoder(images))
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
        return self.decoder(posterior.from_noise(noise)), posterior.kl()

    def forward(self, images, images_seen=0):
        reconstruction, kl = self.reconstruct(images)
        return self.loss(images, reconstruction, kl.mean(), self.decoder.weight, images_seen)

    def players(self):
        return [*self.encoder.parameters(), *self.decoder.parameters()], [*self.loss.discriminator.parameters()]


def batch():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def original(model, images):
    """Both losses as CompVis computes them, pixel by pixel, for a discriminator that has started."""
    reconstruction, kl = model.reconstruct(images)
    distance = model.loss.perceptual(reconstruction, images)  # (B,)
    pixels = (images - reconstruction).abs() + distance[:, None, None, None]  # (B, 3, H, W)
    nll = pixels.sum() / len(images)
    critic = model.loss.discriminator
    generator = -critic(reconstruction).mean()
    norms = [torch.autograd.grad(x, model.decoder.weight, retain_graph=True)[0].norm() for x in (nll, generator)]
    weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach() * DISC_WEIGHT
    first = nll + KL_WEIGHT * kl.sum() / len(images) + weight * generator
    real, fake = critic(images), critic(reconstruction.detach())
    return first, 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())


def test_the_value_and_the_gradients_of_both_players_are_those_of_the_original():
    model, images = Autoencoder(), batch()
    total, terms = model(images)
    total.backward()
    together = [p.grad for player in model.players() for p in player]

    alone = Autoencoder()
    losses = original(alone, images)
    assert_close_relative(total.detach(), sum(losses).detach(), 1e-5)
    assert terms["d_weight"] > 1, "a sum over pixels outweighs a mean over logits"
    separate = [
        g for loss, player in zip(losses, alone.players(), strict=True) for g in torch.autograd.grad(loss, player)
    ]
    for actual, expected in zip(together, separate, strict=True):
        assert_close_relative(actual, expected)


def test_it_is_the_vq_loss_times_the_pixels_but_for_the_penalty():
    images, reconstruction, last_layer = batch(), batch().flip(0), torch.ones(1)
    kl, vq = KLAutoencoderLoss(MultiScaleL1(), kl_weight=2.0), AutoencoderLoss(MultiScaleL1())
    total = kl(images, reconstruction, torch.tensor(5.0), last_layer, images_seen=0).total
    mean = vq(images, reconstruction, torch.tensor(0.0), last_layer, images_seen=0).total
    assert total.item() == pytest.approx(3 * 32 * 32 * mean.item() + 10.0)
    # What is logged and validated is per pixel in both, whatever the size of the images.
    assert torch.equal(kl.reconstruction_loss(images, reconstruction), vq.reconstruction_loss(images, reconstruction))


def test_of_a_perfect_reconstruction_the_divergence_is_left():
    loss = KLAutoencoderLoss(MultiScaleL1())
    standard = DiagonalGaussian(torch.zeros(4, 6, 8, 8))
    shifted = DiagonalGaussian(torch.cat([torch.ones(4, 3, 8, 8), torch.zeros(4, 3, 8, 8)], dim=1))
    images, last_layer = batch(), torch.ones(1)
    assert loss(images, images, standard.kl().mean(), last_layer, images_seen=0).total == 0
    total, terms = loss(images, images, shifted.kl().mean(), last_layer, images_seen=0)
    assert terms["kl"] == 0.5 * 3 * 8 * 8  # half a nat for each latent that lies one deviation away
    assert total.item() == pytest.approx(1e-6 * 96)  # the published weight


def test_before_the_start_neither_player_knows_of_the_other():
    model = Autoencoder(start_images=100)
    total, terms = model(batch(), images_seen=99)
    total.backward()
    assert terms["factor"] == terms["discriminator"] == 0
    assert all(p.grad.abs().max() == 0 for p in model.loss.discriminator.parameters())
    alone = Autoencoder(discriminator=False)
    alone(batch()).total.backward()
    assert torch.equal(model.encoder.weight.grad, alone.encoder.weight.grad)
    assert model(batch(), images_seen=100).terms["factor"] == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_no_adaptive_weight(context):
    with context():
        total, terms = Autoencoder()(batch())
    assert terms["d_weight"] == 0
    assert total.isfinite()


def test_under_autocast_the_loss_is_float32():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, terms = Autoencoder()(batch())
    assert {total.dtype, *(term.dtype for term in terms.values())} == {torch.float32}
    assert_close_relative(total.detach(), Autoencoder()(batch()).total.detach(), 0.02)
