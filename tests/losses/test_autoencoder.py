import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldm_lab.checkpoints.compvis import autoencoder_state, vq_config
from ldm_lab.losses.adversarial import AdversarialTerm
from ldm_lab.losses.autoencoder import AutoencoderLoss
from ldm_lab.losses.perceptual import MultiScaleL1
from ldm_lab.models.discriminator import PatchDiscriminator
from ldm_lab.models.vq_model import VQModel
from tests.helpers import GOLDEN, assert_close_relative


class ConstantDistance(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, reconstruction, target):
        return torch.full((len(target),), self.value)


class Autoencoder(nn.Module):
    """The smallest network that has a last layer, with its loss as a LightningModule would hold it."""

    def __init__(self, discriminator=True, **adversarial):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Conv2d(3, 4, 3, padding=1)
        self.decoder = nn.Conv2d(4, 3, 3, padding=1)
        network = PatchDiscriminator(channels=4, num_layers=2) if discriminator else None
        self.loss = AutoencoderLoss(MultiScaleL1(), network, AdversarialTerm(**adversarial))

    def forward(self, images, images_seen=0):
        latents = self.encoder(images)
        reconstruction = self.decoder(latents.tanh())
        return self.loss(images, reconstruction, latents.float().square().mean(), self.decoder.weight, images_seen)

    def players(self):
        generator = [*self.encoder.parameters(), *self.decoder.parameters()]
        return generator, [*self.loss.discriminator.parameters()]


def batch(seed=0):
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def golden_setup():
    meta = json.loads((GOLDEN / "compvis/meta.json").read_text())
    config = vq_config(**meta["arch"]["vq"])
    state = {key: value.float() for key, value in load_file(GOLDEN / "compvis/vq_state.safetensors").items()}
    autoencoder = VQModel(**config)
    autoencoder.load_weights(autoencoder_state(state, config), origin="golden")
    settings = meta["arch"]["disc"]
    discriminator = PatchDiscriminator(
        settings["disc_in_channels"], settings["disc_ndf"], num_layers=settings["disc_num_layers"]
    )
    state = load_file(GOLDEN / "compvis/disc_state.safetensors")
    discriminator.load_state_dict({key: value if "num_" in key else value.float() for key, value in state.items()})
    loss = AutoencoderLoss(
        ConstantDistance(meta["scalars"]["loss.at_start.ae.p_loss"]),
        discriminator,
        AdversarialTerm(weight=settings["disc_weight"], start_images=settings["disc_start"]),
        codebook_weight=settings["codebook_weight"],
    )
    return autoencoder.train(), loss.train(), settings["disc_start"]


@pytest.mark.parametrize(("when", "offset"), [("before_start", -1), ("at_start", 0)])
def test_loss_and_gradients_of_the_original(when, offset):
    autoencoder, loss, start = golden_setup()
    golden = load_file(GOLDEN / "compvis/io.safetensors")
    golden = {key.removeprefix(f"loss.{when}."): value for key, value in golden.items()}
    images = golden["in.image"]
    codes = autoencoder.quantize(autoencoder.encode(images).latents)
    reconstruction = autoencoder.decode(codes.quantized, force_not_quantize=True).sample
    last_layer = autoencoder.decoder.conv_out.weight
    total, terms = loss(images, reconstruction, codes.loss, last_layer, images_seen=start + offset)
    total.backward()

    names = {
        "nll": "ae.nll_loss", "perceptual": "ae.p_loss", "codebook": "ae.quant_loss", "generator": "ae.g_loss",
        "d_weight": "ae.d_weight", "factor": "ae.disc_factor", "discriminator": "disc.disc_loss",
        "logits_real": "disc.logits_real", "logits_fake": "disc.logits_fake",
    }  # fmt: skip
    for ours, theirs in names.items():
        assert_close_relative(terms[ours], golden[theirs])
    # Theirs are two losses, one for each player; ours is their sum.
    assert_close_relative(total.detach(), golden["ae.total_loss"] + golden["disc.disc_loss"])
    for name in ("encoder.conv_in", "quant_conv", "quantize.embedding", "decoder.conv_out"):
        assert_close_relative(autoencoder.get_parameter(f"{name}.weight").grad, golden[f"grad.{name}.weight"])
    assert_close_relative(loss.discriminator.main[0].weight.grad, golden["grad.disc.main.0.weight"])
    if when == "at_start":
        assert_close_relative(loss.discriminator.main[3].running_mean, golden["disc.bn_running_mean_after"])
        assert loss.discriminator.main[3].num_batches_tracked == 3


def test_one_backward_gives_each_player_its_own_gradient():
    model, images = Autoencoder(), batch()
    generator, discriminator = model.players()
    total, terms = model(images)
    total.backward()
    together = [p.grad.clone() for p in (*generator, *discriminator)]

    # The same game as two losses, by hand.
    alone = Autoencoder()
    latents = alone.encoder(images)
    reconstruction = alone.decoder(latents.tanh())
    critic = alone.loss.discriminator
    generator_loss = alone.loss.reconstruction_loss(images, reconstruction) + latents.square().mean()
    generator_loss = generator_loss - terms["d_weight"] * critic(reconstruction).mean()
    generator, discriminator = alone.players()
    separate = [*torch.autograd.grad(generator_loss, generator)]
    real, fake = critic(images), critic(reconstruction.detach())
    critic_loss = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    separate += torch.autograd.grad(critic_loss, discriminator)
    for actual, expected in zip(together, separate, strict=True):
        assert_close_relative(actual, expected)


def test_before_the_start_the_discriminator_has_gradients_of_zero():
    model = Autoencoder(start_images=100)
    total, terms = model(batch(), images_seen=99)
    total.backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.loss.discriminator.parameters())
    assert terms["factor"] == terms["discriminator"] == 0
    assert_close_relative(total.detach(), terms["nll"] + terms["codebook"], 1e-6)


def test_ramp_scales_the_generator_term_alone():
    total, terms = Autoencoder(start_images=100, ramp_images=100)(batch(), images_seen=125)
    assert terms["factor"] == 0.25
    expected = terms["nll"] + terms["codebook"] + 0.25 * terms["d_weight"] * terms["generator"] + terms["discriminator"]
    assert_close_relative(total.detach(), expected, 1e-6)


def test_without_a_discriminator_no_adversarial_terms_are_left():
    total, terms = Autoencoder(discriminator=False)(batch())
    assert set(terms) == {"rec", "perceptual", "nll", "codebook"}
    assert_close_relative(total.detach(), terms["rec"] + terms["perceptual"] + terms["codebook"], 1e-6)
    assert not any(term.requires_grad for term in terms.values())


def test_weights_multiply_their_terms():
    loss = AutoencoderLoss(ConstantDistance(0.5), perceptual_weight=3.0, codebook_weight=0.1)
    images = batch()
    total, terms = loss(images, images + 0.25, torch.tensor(2.0), torch.ones(1), images_seen=0)
    assert terms["rec"].item() == pytest.approx(0.25)
    assert total.item() == pytest.approx(0.25 + 1.5 + 0.2)
    assert loss.reconstruction_loss(images, images + 0.25).item() == pytest.approx(1.75)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_validation_has_no_adaptive_weight_and_leaves_the_statistics(context):
    model = Autoencoder().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with context():
        total, terms = model(batch())
    assert terms["d_weight"] == 0
    assert total.isfinite()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_under_autocast_losses_are_float32_and_close():
    exact, rounded = Autoencoder(), Autoencoder()
    expected = exact(batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = rounded(batch())
    for output in (expected, actual):
        output.total.backward()
    assert actual.total.dtype == torch.float32
    assert {term.dtype for term in actual.terms.values()} == {torch.float32}
    assert_close_relative(actual.total.detach(), expected.total.detach(), 0.02)
    for mine, reference in zip(rounded.players(), exact.players(), strict=True):
        mine, reference = (torch.cat([p.grad.flatten() for p in player]) for player in (mine, reference))
        assert (mine - reference).norm() < 0.1 * reference.norm()


def test_state_is_the_discriminator_alone():
    model = Autoencoder()
    assert set(model.loss.state_dict()) == {f"discriminator.{key}" for key in model.loss.discriminator.state_dict()}


def accumulate(model, seeds, before_last):
    """Gradients of one batch per seed, summed; all but the last within the context `before_last`."""
    for i, seed in enumerate(seeds):
        last = i == len(seeds) - 1
        with torch.enable_grad() if last else before_last():
            model(batch(seed)).total.backward()


def train_on_rank(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = Autoencoder()
    wrapped = DistributedDataParallel(model)  # unused parameters would be an error in the second step
    for _ in range(2):
        model.zero_grad()
        accumulate(wrapped, (2 * rank, 2 * rank + 1), wrapped.no_sync)
    torch.save([p.grad for p in model.parameters()], f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_and_accumulation_average_the_gradients(tmp_path):
    torch.multiprocessing.spawn(train_on_rank, (tmp_path / "store", tmp_path), nprocs=2)
    gradients = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    expected = Autoencoder()
    accumulate(expected, range(4), torch.enable_grad)
    for first, second, summed in zip(*gradients, expected.parameters(), strict=True):
        assert torch.equal(first, second)
        assert_close_relative(first, summed.grad / 2)
