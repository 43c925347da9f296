"""Reads the YAML config of a CompVis checkpoint: networks and noise schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Self

from ldm_lab.checkpoints.compvis.autoencoder import kl_config, vq_config
from ldm_lab.checkpoints.compvis.translate import check
from ldm_lab.checkpoints.compvis.unet import unet_config
from ldm_lab.utils import shell
from ldm_lab.utils.reading import LoadError, blaming, read_yaml

UNCONDITIONAL = "__is_unconditional__"

_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}  # CompVis's -> ours
_PREDICTIONS = {"eps": "epsilon", "x0": "sample"}

# Keys that only training reads.
_OF_TRAINING = ("ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor", "lossconfig")
_OF_VQ_TRAINING = ("batch_resize_range", "scheduler_config", "lr_g_factor", "sane_index_shape", "use_ema")


@dataclass(frozen=True)
class FirstStageKind:
    """A CompVis class: our class for it, and the translation of its config."""

    class_name: str
    config: Callable[..., dict[str, Any]]
    needed: tuple[str, ...]
    fixed: dict[str, tuple | None]


_KL = FirstStageKind("AutoencoderKL", kl_config, ("ddconfig", "embed_dim"), dict.fromkeys(_OF_TRAINING))
_VQ = FirstStageKind(
    "VQModel",
    vq_config,
    ("ddconfig", "embed_dim", "n_embed"),
    {**dict.fromkeys(_OF_TRAINING + _OF_VQ_TRAINING), "remap": (None,)},
)
_FIRST_STAGES = {"VQModel": _VQ, "VQModelInterface": _VQ, "AutoencoderKL": _KL}


class OriginalConfig:
    """The YAML config of a CompVis/latent-diffusion model, of stage 2 or of a first stage alone.

    Args:
        content: content of the file, plain data; the classes that it names are not imported.
        path: path of the file, for messages.
    """

    def __init__(self, content: Any, path: str | Path) -> None:  # noqa: ANN401
        self._content, self.path = content, Path(path)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a file. Raises `LoadError` if it is missing or not YAML."""
        return cls(read_yaml(shell.path(path)), path)

    @property
    def is_one(self) -> bool:
        """Whether the file describes a model in CompVis's format."""
        model = self._content.get("model") if isinstance(self._content, dict) else None
        return isinstance(model, dict) and isinstance(model.get("params"), dict)

    def first_stage(self) -> tuple[FirstStageKind, dict[str, Any]]:
        """The kind of the first stage, and the arguments of our class.

        Raises:
            LoadError: the file describes no first stage, or one that our classes do not support.
        """
        stage_2 = "first_stage_config" in self._section("model.params")
        section = "model.params.first_stage_config" if stage_2 else "model"
        name = str(self._section(section).get("target")).rpartition(".")[-1]
        if name not in _FIRST_STAGES:
            raise LoadError(f"{self.path}: {section}.target is {name}; known are {', '.join(_FIRST_STAGES)}")
        kind, params = _FIRST_STAGES[name], self._section(f"{section}.params")
        self._section(f"{section}.params.ddconfig")  # raises if it is missing
        with blaming(self.path):
            check(section, params, kind.needed, kind.fixed)
            return kind, kind.config(**{key: params[key] for key in kind.needed})

    def unet(self) -> dict[str, Any]:
        """Arguments of our `UNet2DModel`.

        Raises:
            LoadError: the file describes no UNet, a conditional UNet, or one that our class does not support.
        """
        condition = self._section("model.params").get("cond_stage_config", UNCONDITIONAL)
        if condition != UNCONDITIONAL:
            raise LoadError(f"{self.path}: a conditional model (cond_stage_config), only {UNCONDITIONAL} is supported")
        params = self._section("model.params.unet_config.params")
        with blaming(self.path):
            return unet_config(params)

    def prediction_type(self) -> str:
        """The prediction type of the UNet, in the words of schedulers."""
        return self._known("parameterization", "eps", _PREDICTIONS)

    def noise(self) -> dict[str, Any]:
        """The beta schedule as arguments of a scheduler, with CompVis's defaults."""
        params = self._section("model.params")
        return {
            "num_train_timesteps": params.get("timesteps", 1000),
            "beta_schedule": self._known("beta_schedule", "linear", _SCHEDULES),
            "beta_start": self._number("linear_start", 1e-4),
            "beta_end": self._number("linear_end", 2e-2),
        }

    def scale_factor(self) -> float:
        """The scaling factor of the latents, for checkpoints that do not store it."""
        return self._number("scale_factor", 1.0)

    def _section(self, name: str) -> dict[str, Any]:
        value = self._content
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, dict):
            raise LoadError(f"{self.path}: there is no section {name}")
        return value

    def _number(self, key: str, default: float) -> float:
        value = self._section("model.params").get(key, default)
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as a string
        except (TypeError, ValueError):
            raise LoadError(f"{self.path}: {key}={value!r} is not a number") from None

    def _known(self, key: str, default: str, names: dict[str, str]) -> str:
        value = self._section("model.params").get(key, default)
        if value not in tuple(names):
            raise LoadError(f"{self.path}: {key}={value!r} is not supported; {' or '.join(names)} is")
        return names[value]
