"""Base class of networks that save to and load from folders: a JSON config and weights (`ldm_lab.utils.weights`).

The layout is that of diffusers (`config.json` and `diffusion_pytorch_model.safetensors`), so that both libraries
read the folders without conversion.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ldm_lab.checkpoints.state_dicts import unwrapped
from ldm_lab.utils import hub, shell, weights
from ldm_lab.utils.configurable import Configurable, FrozenConfig, register_to_config
from ldm_lab.utils.errors import UserError, first_line
from ldm_lab.utils.reading import LoadError, blaming, check_plain

__all__ = ["Configurable", "FrozenConfig", "PretrainedModel", "register_to_config"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes of networks
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's ways to spread a network over devices


def floating_type(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """`torch_dtype=` as a dtype, from a dtype or its name. None and "auto" give None: the dtype of the file.

    Raises:
        UserError: it is no dtype, or not a dtype of networks.
    """
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype_name(dtype), None)
    if found not in FLOATS:
        raise UserError(f"torch_dtype={dtype!r}: give one of {', '.join(map(dtype_name, FLOATS))} or auto")
    return found


def dtype_name(dtype: torch.dtype | str) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def one_device(device_map: Any) -> torch.device | None:  # noqa: ANN401
    """`device_map=` as a single device, from a name, an index or `{"": device}`; "auto" is the best available.

    Raises:
        UserError: it names several devices, or a device that is not available.
    """
    if device_map is None:
        return None
    found = device_map.get("") if isinstance(device_map, dict) and len(device_map) == 1 else device_map
    if found in SPREAD:
        found = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.empty(0, device=found).device
    except (RuntimeError, AssertionError, TypeError) as error:
        advice = "give one device for all, such as 'cuda', 'cpu' or 'auto'"
        raise UserError(f"device_map={device_map!r}: {advice} ({first_line(error)})") from error


class PretrainedModel(Configurable, nn.Module):
    """A network with a config: `from_pretrained`, `save_pretrained`, `device`, `dtype`.

    The network chooses the memory layout of its weights (see `models.layout`); files do not record the layout, and
    `load_weights` keeps it.
    """

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def exported_state_dict(self) -> dict[str, Tensor]:
        """The tensors to save, which diffusers' class of the same name has too; without training state."""
        return self.state_dict()

    @property
    def weights_stem(self) -> str:
        """Stem of its weight files: diffusers' stem if diffusers' class of the same name is equivalent."""
        return weights.STEM if self.library == "diffusers" else weights.OWN_STEM

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write the weights and `config.json` into `folder`, each file atomically.

        Args:
            folder: target folder, created if missing; earlier weights of the same variant are replaced.
            safe_serialization: False writes pickles.
            variant: variant in the file names, such as "fp16".
            max_shard_size: maximum bytes of a file, also as "5GB" (default 10 GB); larger weights are sharded.

        Raises:
            SaveError: a file cannot be written.
            UserError: an argument is invalid; the message names it.
        """
        folder = shell.path(folder)
        named = unwrapped(self.exported_state_dict())  # a submodule may be compiled
        tensors = {key: value.detach().contiguous().cpu() for key, value in named.items()}
        weights.write(folder, tensors, self.weights_stem, variant, safe_serialization, max_shard_size)
        self.save_config(folder)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,  # noqa: ANN401
        variant: str | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool | None = None,
        **others: Any,  # noqa: ANN401
    ) -> Self:
        """Load a folder of `save_pretrained`, of this package or of diffusers, in evaluation mode.

        Args:
            source: the folder, or `owner/model` on the Hugging Face hub.
            subfolder: subfolder of the network, such as "unet" in a pipeline.
            torch_dtype: dtype of the weights, or its name; None and "auto" keep the dtype of the file.
            dtype: another name for `torch_dtype`.
            device_map: target device of the network: "cuda", `{"": "cuda:1"}`, or "auto".
            variant: load the weights of this variant ("fp16"); None: the plain weights, or the only variant.
            use_safetensors: False: only pickles; True: only safetensors; None: pickles only without safetensors.
            low_cpu_mem_usage: has no effect, as a network always adopts the tensors of its file.
            others: `revision`, `cache_dir`, `token`, `local_files_only` and `force_download` for a hub model, see
                `hub.fetch`; constructor arguments that replace the config's.

        Raises:
            LoadError: the folder, its config or its weights are missing, corrupt or of another architecture.
                A missing or surplus tensor is an error: no tensor is initialised silently.
            UserError: an argument is invalid; the message names it.
        """
        download, overrides = hub.split(others)
        cls.check_arguments(overrides)
        dtype, device = floating_type(dtype or torch_dtype), one_device(device_map)
        choice = {"variant": variant, "use_safetensors": use_safetensors}
        folder = hub.local(source, subfolder or "", **download, **choice)
        model = cls.skeleton(cls.load_config(folder), str(folder / cls.config_name), **overrides)
        model.load_weights(weights.read(folder, model.weights_stem, **choice), origin=str(folder), assign=True)
        return model.to(device=device, dtype=dtype).eval()

    @classmethod
    def from_tensors(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: str) -> Self:
        """Build from a config and tensors, in evaluation mode.

        Raises:
            LoadError: the config or a tensor does not fit this class; the message begins with `origin`.
        """
        model = cls.skeleton(config, origin)
        model.load_weights(tensors, origin, assign=True)
        return model.eval()

    @classmethod
    def skeleton(cls, config: dict[str, Any], origin: str, **overrides: Any) -> Self:  # noqa: ANN401
        """Build the network of a file's config on the meta device. Raises `LoadError` if the config is invalid."""
        with blaming(origin), torch.device("meta"):
            return cls.from_config(check_plain(config, origin), **overrides)

    def load_weights(self, state: dict[str, Tensor], origin: str, assign: bool = False) -> None:
        """Load `state`, whose names and shapes must be exactly those of this network.

        Args:
            state: tensors by name; known names of 2022 are translated, and wrapper prefixes removed.
            origin: source of the tensors, for the message.
            assign: adopt the tensors instead of copying their values.

        Raises:
            LoadError: a tensor is missing, surplus, or of another shape or kind.
        """
        own, name = self.exported_state_dict(), type(self).__name__
        with blaming(origin):
            renamed = self.rename_legacy_keys(unwrapped(state, own))
        if len(renamed) < len(state):
            raise LoadError(f"{origin}: holds a tensor of this {name} twice, under its name of 2022 and that of today")
        state = renamed
        if missing := sorted(set(own) - set(state)):
            raise LoadError(f"{origin}: no tensor {missing[0]!r} for this {name} ({len(missing)} missing)")
        if unexpected := sorted(set(state) - set(own)):
            raise LoadError(f"{origin}: {name} has no place for {unexpected[0]!r} ({len(unexpected)} left over)")
        for key, value in own.items():
            if value.shape != state[key].shape:
                found, wanted = tuple(state[key].shape), tuple(value.shape)
                raise LoadError(f"{origin}: {key} has shape {found}, this {name} needs {wanted}")
            if (value.dtype in FLOATS) != (state[key].dtype in FLOATS):
                raise LoadError(f"{origin}: {key} holds {state[key].dtype}, this {name} needs {value.dtype}")
            if not state[key].isfinite().all():
                raise LoadError(f"{origin}: {key} holds values that are not finite (NaN or infinity)")
        state = _alike(state)
        if assign:  # they have the file's dtypes and layout
            state = {key: _laid_out(value, own[key].stride()) for key, value in state.items()}
        self.load_state_dict(state, strict=False, assign=assign)

    @classmethod
    def rename_legacy_keys(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Attention names of 2022 (`query`, `key`, `value`, `proj_attn`) -> today's."""
        names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        return {".".join(names.get(part, part) for part in key.split(".")): value for key, value in state.items()}


def _alike(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cast all floating-point tensors to the largest dtype among them, as layers cannot mix dtypes."""
    types = [value.dtype for value in state.values() if value.dtype in FLOATS]
    largest = functools.reduce(torch.promote_types, types, types[0]) if types else None
    return {key: value.to(largest) if value.dtype in FLOATS else value for key, value in state.items()}


def _laid_out(value: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A tensor with `stride`: the tensor itself, or a copy."""
    if value.stride() == stride:
        return value
    return torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device).copy_(value)
