"""The pipeline for sampling: `LDMPipeline(vqvae, unet, scheduler)`, with the interface of diffusers' class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import Self

from ldm_lab.checkpoints import locate, parts
from ldm_lab.diffusion.denoising import denoise
from ldm_lab.diffusion.guidance import Converted, Denoiser, Guidance, guided, require_same_latents
from ldm_lab.diffusion.noise import randn
from ldm_lab.diffusion.samplers import SAMPLERS
from ldm_lab.diffusion.scheduler import Scheduler
from ldm_lab.models.autoencoders import FIRST_STAGES
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.models.outputs import ImagePipelineOutput
from ldm_lab.models.pretrained import floating_type, one_device
from ldm_lab.models.unet import UNet2DModel
from ldm_lab.utils import hub, shell
from ldm_lab.utils.arguments import whole
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.images import array_to_pil, require_pil, to_numpy, to_pil, to_unit
from ldm_lab.utils.memory_switches import MemorySwitches
from ldm_lab.utils.randomness import seeded
from ldm_lab.utils.reading import blaming
from ldm_lab.utils.terminal import say_once

if TYPE_CHECKING:
    import numpy as np

OUTPUT_TYPES = ("pil", "np", "numpy", "pt", "latent")

Generators = torch.Generator | int | Sequence[torch.Generator | int] | None


class LDMPipeline(MemorySwitches):
    """Unconditional image generation: noise -> UNet and scheduler -> latents -> first stage -> images.

    Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models". Diffusion runs on
    `scaling_factor * latents`; decoding divides by the factor and, with a codebook, quantizes.

    Args:
        vqvae: the first stage, of either kind.
        unet: network that predicts `scheduler.config.prediction_type`.
        scheduler: the sampler; assign another one to `pipe.scheduler` to change it. Schedulers of diffusers that are
            compatible with its `LDMPipeline` work too.
        guide: a smaller or less trained network of the same latents, schedule and prediction type, for `guidance_scale`
            (see `diffusion.guidance`; `sampling.guide` loads and checks one). It is not part of a saved folder.
    """

    # A folder may only name these classes and those of plugins, as a config is data and must not cause imports.
    classes: ClassVar[dict[str, tuple[type, ...]]] = {
        "vqvae": tuple(FIRST_STAGES.values()),
        "unet": (UNet2DModel,),
        "scheduler": tuple(SAMPLERS.values()),
    }

    def __init__(
        self, vqvae: FirstStage, unet: UNet2DModel, scheduler: Scheduler, guide: UNet2DModel | Converted | None = None
    ) -> None:
        channels = vqvae.embed_dim
        if (unet.config.in_channels, unet.config.out_channels) != (channels, channels):
            raise UserError(
                f"unet.in_channels={unet.config.in_channels} and out_channels={unet.config.out_channels}, but the"
                f" latents of the autoencoder have {channels} channels: set both to {channels}, or take another one"
            )
        if guide is not None:
            require_same_latents(unet, guide)
        self.vqvae, self.unet, self.scheduler, self.guide = vqvae, unet, scheduler, guide
        self._progress: dict[str, Any] = {}

    @property
    def components(self) -> dict[str, Any]:
        """The three parts by name, and a guide; `LDMPipeline(**pipe.components)` shares them."""
        return {**self.networks, "scheduler": self.scheduler}

    def progress_bar(self, iterable: Iterable | None = None, total: int | None = None) -> tqdm:
        """Progress bar over the steps; see `set_progress_bar_config`."""
        return tqdm(iterable, **{"total": total, **self._progress})

    def set_progress_bar_config(self, **settings: Any) -> None:  # noqa: ANN401
        """Set tqdm's settings of the progress bar, e.g. `disable=True`."""
        self._progress = settings

    def register_modules(self, **components: Any) -> None:  # noqa: ANN401
        """Replace parts: `vqvae=`, `unet=`, `scheduler=`."""
        for name, part in components.items():
            if name not in self.classes:
                raise TypeError(f"LDMPipeline has no part {name!r}; it has {', '.join(self.classes)}")
            setattr(self, name, part)

    numpy_to_pil = staticmethod(array_to_pil)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        latents: Tensor | None = None,
        callback: Callable[[int, int, Tensor], None] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            batch_size: number of images.
            generator: generator (or seed) of all random numbers, also of the noise that `eta` adds; a list has one per
                image, which makes each image independent of its batch.
            eta: 0 is deterministic DDIM, 1 has the variance of DDPM (Song et al. 2021, eq. 16). A scheduler without eta
                only accepts 0.
            num_inference_steps: number of UNet evaluations.
            output_type: "pil" (8 bits; one channel or three), "np" (or "numpy"), "pt" or "latent".
            return_dict: `False` returns `(images,)`.
            latents: the starting noise `(B, C, h, w)`, scaled for the scheduler.
            callback: called after each step with (step, timestep, latents).
            guidance_scale: w of autoguidance: 1 is without the guide, above 1 leads away from it.
            guidance_interval: noise levels σ/α (low, high) between which the guide acts; None: everywhere.

        Raises:
            UserError: an argument is out of range, or pixels of "pil" or "np" are not finite; the message says which.
        """
        self._check(output_type, latents)
        network = self.denoiser(Guidance(guidance_scale, guidance_interval))
        generator = seeded(generator)
        self.scheduler.set_timesteps(whole("num_inference_steps", num_inference_steps))
        if latents is None:
            latents = self.noise(whole("batch_size", batch_size), generator)
        latents = self._denoise(network, latents.to(self.device), generator, eta, callback)
        images = self._output(latents, output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def _check(self, output_type: str, latents: Tensor | None) -> None:
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type is {output_type!r}, must be one of {', '.join(OUTPUT_TYPES)}")
        if output_type == "pil":
            require_pil(self.vqvae.config.out_channels)
        channels = self.unet.config.in_channels
        if latents is not None and (latents.ndim != 4 or latents.shape[1] != channels):
            raise UserError(f"latents have shape {tuple(latents.shape)}, must be (B, {channels}, h, w)")

    def noise(self, batch_size: int, generator: Generators = None) -> Tensor:
        """The starting noise `(B, C, h, w)`. Raises `UserError` if the UNet's config has no sample size.

        Schedulers of diffusers scale it for the first of their timesteps.
        """
        size = self.unet.config.sample_size
        if size is None:
            raise UserError("the UNet's config has no sample_size: pass latents=")
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        return randn(shape, generator=seeded(generator), device=self.device) * self.scheduler.init_noise_sigma

    def denoiser(self, guidance: Guidance) -> Denoiser:
        """The network for `denoise`: the UNet, or with guidance the UNet and the guide. See `guidance.guided`."""
        return guided(self.unet, self.guide, self.scheduler, guidance)

    def _denoise(
        self, network: Denoiser, latents: Tensor, generator: Generators, eta: float, callback: Callable | None
    ) -> Tensor:
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            for index, (timestep, output) in enumerate(denoise(network, self.scheduler, latents, generator, eta)):
                latents = output.prev_sample
                bar.update()
                if callback is not None:
                    callback(index, int(timestep), latents)
        return latents

    def _output(self, latents: Tensor, output_type: str) -> list | np.ndarray | Tensor:
        if output_type == "latent":
            return latents
        images = to_unit(self.decode(latents))
        if output_type != "pt" and not images.isfinite().all():
            raise UserError(f"the images are not finite: the networks overflow {self.dtype}, or their weights are bad")
        return {"pt": lambda x: x, "np": to_numpy, "numpy": to_numpy, "pil": to_pil}[output_type](images)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents `(B, c, h, w)` -> images `(B, C, H, W)`, about [-1, 1], float32."""
        latents = latents / self.vqvae.config.scaling_factor
        return self.vqvae.decode(latents.to(self.vqvae.dtype)).sample.float()

    def save_pretrained(
        self,
        folder: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write a folder for `from_pretrained` of this package and of diffusers; `model_index.json` is written last.

        For the arguments see a network's `save_pretrained`. A compiled network is written as an uncompiled one.
        """
        files = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        if self.guide is not None:
            say_once("the guide is not part of the folder: save its own pipeline, and name that with guide=")
        components = {name: part for name, part in self.components.items() if name in self.classes}
        parts.write(shell.path(folder), components, **files)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        *,
        vqvae: FirstStage | None = None,
        unet: UNet2DModel | None = None,
        scheduler: Scheduler | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,  # noqa: ANN401
        variant: str | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool | None = None,
        plugins: Sequence[str] = (),
        **download: Any,  # noqa: ANN401
    ) -> Self:
        """Load a pipeline folder, a run (finished or not), a snapshot, a checkpoint or a model on the hub.

        Arguments that are not listed here are those of a network's `from_pretrained`.

        Args:
            source: the folder or file; `runs/x@2M` is a snapshot (see `checkpoints.locate`); `owner/model`, if there is
                no such folder, is a model on the Hugging Face hub. For a CompVis file see `from_single_file`.
            torch_dtype: dtype of the networks, or its name; None and "auto" keep the dtype of the file.
            device: target device of the networks; None: the CPU.
            vqvae, unet, scheduler: parts to use instead of the source's, which are then neither read nor downloaded.
            variant: variant of the weights ("fp16"); a network without it loads its plain weights, unless none has it.
            plugins: packages that may be imported, as the files may name their classes.
            download: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`: see `hub.fetch`.

        Raises:
            LoadError: there is no such model, or it is corrupt; the one-line message says what and where.
            UserError: an argument is invalid; the message names it.
        """
        dtype, device = floating_type(dtype or torch_dtype), one_device(device_map) or device
        if unknown := hub.split(download)[1]:
            raise TypeError(f"{cls.__name__}.from_pretrained has no argument {sorted(unknown)}")
        given = {"vqvae": vqvae, "unet": unet, "scheduler": scheduler}
        given = {name: part for name, part in given.items() if part is not None}
        choice = {"variant": variant, "use_safetensors": use_safetensors}
        path = locate.find(source, without=tuple(given), **download, **choice).path
        return cls.from_file_or_folder(path, given=given, plugins=plugins, **choice).to(device=device, dtype=dtype)

    @classmethod
    def from_file_or_folder(cls, path: Path, **reading: Any) -> Self:  # noqa: ANN401
        """Build a pipeline from the parts of a local checkpoint or pipeline folder.

        Args:
            path: the file or folder.
            reading: see `checkpoints.parts.read`.

        Raises:
            LoadError: a part is missing, corrupt, or does not fit the other parts.
        """
        found = parts.read(path, cls.classes, **reading)
        with blaming(path):
            return cls(**found)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        original_config: str | Path | None = None,
        use_ema: bool = True,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load a checkpoint of CompVis/latent-diffusion, with a scheduler equivalent to CompVis's DDIM.

        Args:
            path: the file, `model.ckpt`.
            original_config: its YAML file, which describes the architecture. None: a `config.yaml` beside the file;
                without it, the architecture is inferred from the tensors, and a line names the settings that they
                leave open and the assumed values.
            use_ema: use the moving average of the UNet's weights, as CompVis does; False: the raw weights.
            torch_dtype: dtype of the networks; None keeps the dtype of the file.
            device: target device of the networks; None: the CPU.

        Raises:
            LoadError: a file is missing or corrupt, the model is conditional or has no first stage, or a tensor is
                missing or surplus; the one-line message names it.
        """
        reading = {"original_config": original_config, "use_ema": use_ema}
        pipe = cls.from_file_or_folder(shell.path(path), single_file=reading)
        return pipe.to(device=device, dtype=floating_type(torch_dtype))
