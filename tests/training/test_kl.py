"""KL autoencoders, and `model.train=decoder` for both kinds: what is drawn, measured, continued and left alone."""

from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer

from ldm_lab.config.compose import Recipe, build
from ldm_lab.data.drawn import DrawnImages
from ldm_lab.metrics.reconstruction import psnr
from ldm_lab.models.autoencoders import load_autoencoder
from ldm_lab.models.first_stage import DECODER
from ldm_lab.models.kl_model import AutoencoderKL
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.utils import randomness
from tests.helpers import assert_close_relative
from tests.trained import metrics, train, undisturbed
from tests.training.test_resume import assert_same_training, interrupt

RECIPE = "experiment=lsun_churches"
STAGES = ("autoencoder", "diffusion")


def images(split):
    return torch.stack([image["image"] for image in DrawnImages(split, 32)])


@pytest.fixture(scope="module")
def run(tiny_runs):
    return tiny_runs / "lsun_churches"


@pytest.fixture
def module():
    """Stage 1 of churches, untrained."""
    (config,) = Recipe.parse([f"{RECIPE}/autoencoder", "debug=tiny"]).compose()
    return build(config.model, "model")


def batch_of(module, positions, training=True):
    module._trainer = SimpleNamespace(training=training)
    batch = {"image": torch.zeros(len(positions), 3, 32, 32), "position": torch.tensor(positions)}
    return module.on_before_batch_transfer(batch, 0)


def test_draws_follow_from_seed_and_position(module):
    noise = batch_of(module, [4, 5, 6])["posterior_noise"]
    assert noise.shape == (3, 4, 8, 8)
    assert torch.equal(noise[1:2], batch_of(module, [5])["posterior_noise"])
    assert torch.equal(noise, randomness.normal(0, "posterior", [4, 5, 6], (4, 8, 8)))
    module.seed = 1
    assert not torch.equal(noise, batch_of(module, [4, 5, 6])["posterior_noise"])
    assert "posterior_noise" not in batch_of(module, [4], training=False)


def test_training_reconstructs_from_a_draw_and_validation_from_the_mode(module):
    batch = batch_of(module, [0, 1])
    posterior = module.autoencoder.encode(batch["image"]).latent_dist
    reconstruction, kl = module.reconstruct(batch)
    drawn = posterior.mean + posterior.var.sqrt() * batch["posterior_noise"]
    assert_close_relative(reconstruction.detach(), module.autoencoder.decode(drawn).sample.detach())
    assert torch.equal(module.encode(batch["image"])[0], posterior.mean)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0))
    assert_close_relative(kl.detach(), expected.sum((1, 2, 3)).mean().detach(), 1e-5)


def test_validation_measures_the_mode(run):
    autoencoder = AutoencoderKL.from_pretrained(run / "autoencoder/final")
    held_out = images("val")
    with torch.no_grad():
        posterior = autoencoder.encode(held_out).latent_dist
        reconstruction = autoencoder.decode(posterior.mean).sample
    row = metrics(run / "autoencoder")[64]
    assert row["val/psnr"] == pytest.approx(psnr(reconstruction, held_out).item(), rel=1e-4)
    assert row["val/kl"] == pytest.approx(posterior.kl().mean().item(), rel=1e-4)
    assert row["val/posterior_std"] == pytest.approx(posterior.std.mean().item(), rel=1e-4)
    assert not [key for key in row if key.startswith("codebook/")]


def test_the_scale_is_that_of_drawn_latents(run):
    """Var z = Var mean + mean of the variances: that of the draws, which are wider than their modes."""
    first = AutoencoderKL.from_pretrained(run / "autoencoder/final")
    with torch.no_grad():
        posterior = first.encode(images("train")).latent_dist
    expected = (posterior.mean.var(correction=0) + posterior.var.mean()) ** -0.5
    measured = load_autoencoder(run).config.scaling_factor
    assert measured == pytest.approx(expected.item(), rel=0.02)
    assert measured < 0.9 / posterior.mean.std().item()
    assert first.config.scaling_factor == 1.0


def test_the_run_is_a_pipeline_with_a_kl_autoencoder(run):
    pipe = LDMPipeline.from_pretrained(run)
    assert (type(pipe.vqvae), pipe.unet.config.num_attention_heads) == (AutoencoderKL, 8)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt").images.shape == (
        2,
        3,
        32,
        32,
    )


@pytest.mark.soak
def test_interrupted_stages_end_as_undisturbed_ones(run, tmp_path):
    for stage in STAGES:
        with pytest.raises(SystemExit):
            train(tmp_path, RECIPE, "plugins=[tests]", *interrupt(stage, 32))
    train(tmp_path, RECIPE)
    for stage in STAGES:
        assert_same_training(tmp_path / "lsun_churches" / stage, run / stage)


def test_the_loss_of_a_batch_is_the_mean_over_its_parts(module):
    """What accumulates gradients over parts of a batch trains on the same draws."""

    def loss(positions):
        batch = batch_of(module, positions)
        batch["image"] = images("train")[positions]
        reconstruction, kl = module.reconstruct(batch)
        return module.loss(batch["image"], reconstruction, kl, module.autoencoder.decoder.conv_out.weight, 0).total

    parts = (loss([0, 1]) + loss([2, 3])) / 2
    assert_close_relative(loss([0, 1, 2, 3]).detach(), parts.detach(), 1e-6)


# --- model.train=decoder


def train_decoder(experiment, source, steps=4):
    """A few steps from the first stage in `source`, with the discriminator from the start."""
    overrides = ["debug=tiny", "model.train=decoder", "model.loss.adversarial.start_images=0"]
    (config,) = Recipe.parse([f"experiment={experiment}/autoencoder", *overrides]).compose()
    module = build(config.model, "model", autoencoder=load_autoencoder(source))
    critic = {key: value.clone() for key, value in module.loss.state_dict().items()}
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with undisturbed():
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, limit_val_batches=0, use_distributed_sampler=False, **quiet
        )
        trainer.fit(module, build(config.data.module, "data"))
    assert any(not torch.equal(value, critic[key]) for key, value in module.loss.state_dict().items())
    return module.autoencoder.eval()


@pytest.mark.parametrize("experiment", ["celebahq", "lsun_churches"])
def test_training_the_decoder_leaves_the_latents(tiny_runs, experiment):
    before = load_autoencoder(tiny_runs / experiment)
    after = train_decoder(experiment, tiny_runs / experiment)
    old = before.state_dict()
    changed = {key.split(".")[0] for key, value in after.state_dict().items() if not torch.equal(value, old[key])}
    assert changed == set(DECODER)
    held_out = images("val")
    with torch.no_grad():
        assert torch.equal(after.latents(held_out), before.latents(held_out))
        assert not torch.equal(
            after.decode(after.latents(held_out)).sample, before.decode(after.latents(held_out)).sample
        )


def test_what_is_trained_is_all_or_the_decoder(tmp_path):
    with pytest.raises(ValueError, match=r"model\.train=encoder: must be all or decoder") as error:
        train(tmp_path, f"{RECIPE}/autoencoder", "model.train=encoder")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
