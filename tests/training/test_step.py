"""What a training step does beside forward and backward, and what it does not do."""

import sys

import pytest
import torch
from lightning import Callback
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ldm_lab.training.callbacks.progress import Progress
from ldm_lab.training.planning.estimate import NoTrainer, estimate
from ldm_lab.utils.pixels import RGB_8_BIT
from tests.helpers import assert_close_relative
from tests.trained import final_weights, train
from tests.training.stages import tiny

STAGES = pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
SIZE = (32, 32)

# Who reads numbers in a step: of tensors that lie on the host on any machine, and, last, of a copy that was begun in
# the step before.
READERS = {
    "sampler.index", "latents.__getitem__", "scheduler.rates", "diffusion_module.on_before_batch_transfer",
    "not_finite._settle",
}  # fmt: skip

FOUND = set()  # who did


def reader():
    """`module.function` of the innermost frame that is not torch's own."""
    frame = sys._getframe(2)
    while frame and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{frame.f_globals['__name__'].rsplit('.', 1)[-1]}.{frame.f_code.co_name}"


class Values(TorchDispatchMode):
    """Notes who asks for a value, or for a tensor whose size depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select"):
            FOUND.add(reader())
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Notes who asks for all values: of these reads torch's core does not tell."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("tolist", "numpy", "cpu"):
            FOUND.add(reader())
        return func(*args, **(kwargs or {}))


class Watch(Callback):
    """Watches two steps, with all that lies between them."""

    def __init__(self):
        self.modes = Values(), Lists()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.images_seen == 24:
            for mode in self.modes:
                mode.__enter__()
        elif module.images_seen == 40:
            for mode in reversed(self.modes):
                mode.__exit__(None, None, None)


@STAGES
def test_no_step_waits_for_the_device(stage, tiny_runs, tmp_path, monkeypatch):
    """Other than for the loss on the progress bar, once a second, and for what is logged, each 10th step."""
    monkeypatch.setattr(Progress, "SHOW_LOSS_EVERY", float("inf"))
    FOUND.clear()
    train(
        tmp_path, f"experiment=celebahq/{stage}", f"autoencoder={tiny_runs}/celebahq", "max_images=48",
        "trainer.log_every_n_steps=100", "trainer.gradient_clip_val=1", "validate_every=100", "checkpoint_every=100",
        "plugins=[tests]", "+callbacks.watch._target_=tests.training.test_step.Watch",
    )  # fmt: skip
    assert "not_finite._settle" in FOUND
    assert FOUND <= READERS


def test_a_run_goes_on_with_another_kind_of_optimizer_and_with_gradient_checkpointing(tiny_runs, tmp_path):
    command = ("experiment=celebahq/diffusion", f"autoencoder={tiny_runs}/celebahq")
    train(tmp_path, *command, "max_images=32", "model.optimizer.fused=false")
    train(tmp_path, *command, "model.gradient_checkpointing=true")
    runs = (tmp_path, tiny_runs)
    one, other = (final_weights(folder / "celebahq/diffusion") for folder in runs)
    for file, weights in other.items():
        for key, value in weights.items():
            assert_close_relative(one[file][key], value, 1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_before_a_fused_optimizer(tiny_runs, tmp_path, precision):
    """Gradients of no size leave zeros what they are. Lightning alone refuses to clip them under bfloat16."""
    command = ("experiment=celebahq/diffusion", f"autoencoder={tiny_runs}/celebahq", "max_images=8")
    train(tmp_path, *command, f"trainer.precision={precision}", "trainer.gradient_clip_val=1e-30")
    (weights,) = (w for file, w in final_weights(tmp_path / "celebahq/diffusion").items() if "unet" in file)
    assert weights["conv_out.weight"].abs().max() < 1e-12  # it began with zeros


@STAGES
def test_gradient_checkpointing_needs_less_memory(stage):
    small = ["model.loss.discriminator=null"] if stage == "autoencoder" else []
    kept, again = (
        estimate(tiny(f"celebahq/{stage}", f"model.gradient_checkpointing={on}", *small)[0], SIZE, 8)
        for on in ("false", "true")
    )
    assert again.held == kept.held
    assert again.work < 0.8 * kept.work


class Operations(TorchDispatchMode):
    """Counts those of convolutions and products. `FlopCounterMode` cannot follow a gradient within a step."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.count += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=output)
        return output


def step(module):
    """Operations of a training step, forward and backward."""
    module.trainer = NoTrainer(2, SIZE, RGB_8_BIT)
    module.log = module.log_dict = lambda *_, **__: None
    batch = {"image": torch.randn(2, 3, *SIZE), "position": torch.arange(2)}
    with Operations() as counted:
        module.training_step(batch, 0).backward()
    return counted.count


def passes(network, channels):
    """Operations of a forward, a backward to all weights, and a backward to the input, of two images."""
    images = torch.randn(2, channels, *SIZE)
    with Operations() as forward:
        output = network(images).sum()
    with Operations() as weights:
        output.backward()
    output = network.requires_grad_(False)(images.requires_grad_()).sum()
    with Operations() as inputs:
        output.backward()
    return forward.count, weights.count, inputs.count


def test_two_players_share_one_forward_and_backward_of_the_autoencoder():
    alone, module = (
        step(tiny("celebahq/autoencoder", "model.loss.discriminator=null")[0]),
        tiny("celebahq/autoencoder")[0],
    )
    both, layer = step(module), module.autoencoder.decoder.conv_out
    forward, weights, inputs = passes(module.loss.discriminator, 3)
    # Generator: a forward and two backward to the image, one of them for the adaptive weight, which takes two gradients
    # of the last layer. Discriminator: a forward and a backward to its weights, of images and of reconstructions.
    expected = (forward + 2 * inputs) + 2 * passes(layer, layer.in_channels)[1] + 2 * (forward + weights)
    assert both - alone == expected
