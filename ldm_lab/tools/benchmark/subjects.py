"""Benchmarks of a model: each function makes the contestants of one comparison, ours first."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ldm_lab.config import stages
from ldm_lab.config.compose import DictConfig, Recipe, build
from ldm_lab.data.transforms import parse_size
from ldm_lab.models.pretrained import PretrainedModel, dtype_name
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.tools.benchmark.contest import Contestant, synchronize
from ldm_lab.training.callbacks.not_finite import gradient_norms
from ldm_lab.training.ema import EMA
from ldm_lab.training.latents import latent_shape
from ldm_lab.utils.compiled import compile_for_inference
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.images import save_pngs, to_pil


@dataclass
class Subject:
    """A model with the settings of its benchmarks.

    Attributes:
        pipe: our networks and scheduler.
        config: config of stage 2.
        batch_size: images per run.
        steps: sampling steps.
        dtype: float32 or bfloat16: dtype of the networks in sampling and encoding, of autocast in training.
        peer_dtype: dtype for diffusers: float32, or bfloat16 by autocast.
        against: whether diffusers takes part.
        folder: folder for files.
    """

    pipe: LDMPipeline
    config: DictConfig
    batch_size: int
    steps: int
    dtype: torch.dtype
    peer_dtype: torch.dtype
    against: bool
    folder: Path

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.pipe.device

    def images(self) -> Tensor:
        """Noise images `(B, C, H, W)` in [-1, 1]; content does not change the time of kernels."""
        shape = (self.pipe.vqvae.config.in_channels, *parse_size(self.config.data.image_size))
        return torch.rand(self.batch_size, *shape, device=self.device) * 2 - 1

    def generator(self) -> torch.Generator:
        """Generator of the starting noise, always the same; on the CPU, as diffusers requires."""
        return torch.Generator().manual_seed(0)

    def peer_context(self) -> torch.autocast:
        """Autocast context for diffusers."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.peer_dtype is torch.bfloat16)

    def noise(self) -> Tensor:
        """Normal noise of the latents' shape, `(B, C, h, w)`."""
        shape = latent_shape(self.pipe.vqvae, parse_size(self.config.data.image_size))
        return torch.randn(self.batch_size, *shape, device=self.device)


def load(
    experiment: str, overrides: list[str], ckpt: str | None, device: torch.device
) -> tuple[LDMPipeline, DictConfig]:
    """The model of an experiment, with random weights or the weights of `ckpt`, and the config of stage 2."""
    configs = Recipe.parse([f"experiment={experiment}", *overrides]).compose()
    config = configs[-1]
    if config.stage != "diffusion" or (len(configs) < 2 and not ckpt):
        raise UserError(f"--experiment {experiment}: name one with both stages, e.g. celebahq")
    torch.manual_seed(config.seed)
    if ckpt:
        return LDMPipeline.from_pretrained(ckpt).to(device), config
    autoencoder = stages.networks(configs[0], None)["autoencoder"]
    parts = stages.networks(config, autoencoder)
    _, height, width = latent_shape(autoencoder, parse_size(config.data.image_size))
    parts["unet"].register_to_config(sample_size=height if height == width else [height, width])
    autoencoder.register_to_config(scaling_factor=1.0)
    pipe = LDMPipeline(autoencoder.eval(), parts["unet"].eval(), parts["scheduler"])
    return pipe.to(device), config


def sample(subject: Subject) -> list[Contestant]:
    """The whole pipeline, from noise to PNG files; compares pixels in [0, 1]."""
    pipe = subject.pipe
    peer_pipe = peer_pipeline(pipe) if subject.against else None
    pipe.to(dtype=subject.dtype).set_progress_bar_config(disable=True)

    def own() -> Tensor:
        images = pipe(**settings, generator=subject.generator(), output_type="pt").images  # (B, 3, H, W)
        save_pngs({subject.folder / f"own_{index}.png": image for index, image in enumerate(to_pil(images))})
        return images

    def other() -> Tensor:
        with subject.peer_context():
            images = peer_pipe(**settings, generator=subject.generator(), output_type="np").images  # (B, H, W, 3)
        for index, image in enumerate(peer_pipe.numpy_to_pil(images)):
            image.save(subject.folder / f"peer_{index}.png")
        return torch.from_numpy(images).permute(0, 3, 1, 2)  # -> (B, 3, H, W)

    settings = {"batch_size": subject.batch_size, "num_inference_steps": subject.steps}
    return _pair(subject, own, other, pipe.compile)


def encode(subject: Subject) -> list[Contestant]:
    """Images to latents (to moments for a KL first stage)."""
    vqvae = subject.pipe.vqvae
    return _networks(subject, vqvae, vqvae.encoder, subject.images(), lambda own, x: own.moments(x), _encoded)


def forward(subject: Subject) -> list[Contestant]:
    """One call of the UNet."""
    unet, timestep = subject.pipe.unet, torch.tensor(500, device=subject.device)
    return _networks(subject, unet, unet, subject.noise(), lambda network, x: network(x, timestep).sample)


def decode(subject: Subject) -> list[Contestant]:
    """Latents to images."""
    vqvae = subject.pipe.vqvae
    return _networks(subject, vqvae, vqvae.decoder, subject.noise(), lambda network, x: network.decode(x).sample)


Call = Callable[[nn.Module, Tensor], Tensor]


def _networks(
    subject: Subject, network: PretrainedModel, compiled: nn.Module, x: Tensor, call: Call, theirs: Call | None = None
) -> list[Contestant]:
    """Contestants of a call of one network with the input `x`; `theirs` is the peer's call, if it is another one."""
    peer = peer_network(network) if subject.against else None
    network.to(dtype=subject.dtype)
    own = torch.no_grad()(lambda: call(network, x.to(subject.dtype)))
    other = _peers(subject, lambda: (theirs or call)(peer, x))
    return _pair(subject, own, other, partial(compile_for_inference, compiled))


def train(subject: Subject) -> list[Contestant]:
    """A training step of stage 2 without the loader: ours on cached latents, diffusers' with encoding.

    Forward, backward, clipping, optimizer step and EMA, all with the experiment's settings.
    """
    steps = [
        Step(subject, subject.pipe.unet, lambda network: build(subject.config.model.ema, "model.ema", network=network))
    ]
    if subject.against:
        from diffusers.training_utils import EMAModel

        unet, vqvae = peer_network(subject.pipe.unet), peer_network(subject.pipe.vqvae)
        images = subject.images()
        average = Step(subject, unet, lambda network: EMAModel(network.parameters(), decay=0.9999))
        average.encode = _peers(subject, lambda: _encoded(vqvae, images))
        average.dtype = subject.peer_dtype
        steps.append(average)
    names = ("ldm_lab {}, cached latents", "diffusers {}, encode in the step")
    found = [
        Contestant(name.format(dtype_name(step.dtype)), step, subject.batch_size, step.dtype, rest=step.rest)
        for name, step in zip(names, steps, strict=False)
    ]
    found[0].compile = steps[0].network.compile
    return found


class Step:
    """One training step.

    Args:
        subject: the model.
        network: its UNet, ours or diffusers'.
        make_average: makes the EMA of the network.
    """

    def __init__(self, subject: Subject, network: nn.Module, make_average: Callable[[nn.Module], Any]) -> None:
        config = subject.config
        self.network, self.device, self.dtype = network.train(), subject.device, subject.dtype
        self.objective = build(config.model.objective, "model.objective", scheduler=subject.pipe.scheduler)
        parameters = list(network.parameters())
        self.optimizer = build(config.model.optimizer, "model.optimizer", params=[{"params": parameters}])
        self.average, self.clip = make_average(network), config.trainer.gradient_clip_val
        self.latents, self.noise = subject.noise(), subject.noise()
        self.timesteps = torch.arange(len(self.noise), device=self.device) * 37 % 1000
        self.encode: Callable[[], Tensor] | None = None
        self.rest: list[float] = []

    def __call__(self) -> None:
        """Run the step."""
        latents = self.encode() if self.encode else self.latents
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            loss = self.objective(lambda x, t: self.network(x, t).sample, latents, self.noise, self.timesteps).mean()
        loss.backward()
        synchronize(self.device)
        start = time.perf_counter()
        if isinstance(self.average, EMA):
            gradient_norms(self.network)  # training computes them in every step
        if self.clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if isinstance(self.average, EMA):
            self.average.update(self.network)
        else:
            self.average.step(self.network.parameters())
        synchronize(self.device)
        self.rest.append(time.perf_counter() - start)


def _peers(subject: Subject, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Wrap a call of diffusers' networks in `no_grad` and autocast."""

    @torch.no_grad()
    def computed() -> Tensor:
        with subject.peer_context():
            return run()

    return computed


def _encoded(vqvae: nn.Module, images: Tensor) -> Tensor:
    """Encoding by diffusers' first stage: latents, or moments of a KL first stage."""
    found = vqvae.encode(images)
    return found.latents if hasattr(found, "latents") else found.latent_dist.parameters


def _pair(subject: Subject, own: Callable, other: Callable, compile_own: Callable[[], object]) -> list[Contestant]:
    """Our contestant, and diffusers' if it takes part."""
    first = Contestant(f"ldm_lab {dtype_name(subject.dtype)}", own, subject.batch_size, subject.dtype, compile_own)
    second = Contestant(f"diffusers {dtype_name(subject.peer_dtype)}", other, subject.batch_size, subject.peer_dtype)
    return [first, second][: 1 + subject.against]


def _diffusers() -> ModuleType:
    """The module diffusers. Raises `UserError` if it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError("--against diffusers: it is not installed; pip install 'ldm_lab[benchmark]'") from error
    diffusers.utils.logging.set_verbosity_error()
    return diffusers


def peer_network(own: PretrainedModel) -> Any:  # noqa: ANN401
    """The diffusers network of the same name, weights, device and dtype, in evaluation mode.

    Raises:
        UserError: diffusers has no such network.
    """
    kind = getattr(_diffusers(), own.class_name(), None)
    if kind is None:
        raise UserError(f"--against diffusers: it has no {own.class_name()}")
    twin = kind.from_config(dict(own.config))
    twin.load_state_dict({key: value.contiguous() for key, value in own.exported_state_dict().items()})
    return twin.to(device=own.device, dtype=own.dtype).eval()


def peer_pipeline(own: LDMPipeline) -> Any:  # noqa: ANN401
    """The diffusers pipeline of the same networks, with DDIM."""
    diffusers = _diffusers()
    scheduler = diffusers.DDIMScheduler.from_config(dict(own.scheduler.config))
    twin = diffusers.LDMPipeline(vqvae=peer_network(own.vqvae), unet=peer_network(own.unet), scheduler=scheduler)
    twin.set_progress_bar_config(disable=True)
    # numpy has no bfloat16, which autocast returns.
    twin.vqvae.decoder.register_forward_hook(lambda _, inputs, output: output.float())
    return twin
