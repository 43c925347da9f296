"""Settings of a scheduler: allowed settings, the file, and building one scheduler from another one's config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from ldm_lab.diffusion.parameterization import PARAMETERIZATIONS, Parameterization
from ldm_lab.diffusion.spacing import SPACINGS
from ldm_lab.utils import hub
from ldm_lab.utils.arguments import is_integer, is_number, require, require_choice
from ldm_lab.utils.configurable import Configurable, FrozenConfig
from ldm_lab.utils.reading import blaming
from ldm_lab.utils.terminal import say_once

# Settings of schedulers here and in diffusers; all accept each other's configs.
SHARED = {
    "algorithm_type", "clip_sample", "clip_sample_range", "disable_corrector", "dynamic_thresholding_ratio",
    "euler_at_final", "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped",
    "lower_order_final", "noise_sampler_seed", "predict_x0", "rescale_betas_zero_snr", "rho", "sample_max_value",
    "set_alpha_to_one", "shift_terminal", "sigma_data", "sigma_max", "sigma_min", "sigma_schedule", "skip_prk_steps",
    "solver_order", "solver_p", "solver_type", "steps_offset", "thresholding", "time_shift_type", "timestep_spacing",
    "timestep_type", "use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas", "use_flow_sigmas",
    "use_karras_sigmas", "use_lu_lambdas", "variance_type",
}  # fmt: skip


class SchedulerSettings(Configurable):
    """Base class of `Scheduler` with the settings that all samplers share.

    Args:
        num_train_timesteps: T.
        beta_start: β of the first timestep.
        beta_end: β of the last timestep.
        beta_schedule: "linear", "scaled_linear" (CompVis's "linear") or "squaredcos_cap_v2".
        trained_betas: betas instead of a schedule; their number is T.
        prediction_type: the network's prediction: "epsilon", "sample" (x0) or "v_prediction".
        thresholding: dynamic thresholding of the predicted x0, instead of clipping.
        dynamic_thresholding_ratio: quantile of the thresholding.
        sample_max_value: upper bound of the threshold.
        timestep_spacing: "leading", "trailing" or "linspace".
        steps_offset: added to the timesteps of "leading".
        rescale_betas_zero_snr: make the last timestep pure noise; needs "sample" or "v_prediction".

    Attributes:
        parameterizations: prediction types by name.
    """

    config_name = "scheduler_config.json"
    ignores_unknown = True
    parameterizations: ClassVar[Mapping[str, Parameterization]] = PARAMETERIZATIONS

    def _check_config(self) -> None:
        config = self.config
        require_choice("prediction_type", config.prediction_type, self.parameterizations)
        require_choice("timestep_spacing", config.timestep_spacing, SPACINGS)
        offset, clip, limit = config.steps_offset, config.get("clip_sample_range", 1.0), config.sample_max_value
        require(is_integer(offset) and offset >= 0, "steps_offset", offset, "a whole number, at least 0")
        require(is_number(clip) and clip > 0, "clip_sample_range", clip, "a number above 0")
        require(is_number(limit) and limit > 0, "sample_max_value", limit, "a number above 0")
        ratio = config.dynamic_thresholding_ratio
        require(is_number(ratio) and 0 <= ratio <= 1, "dynamic_thresholding_ratio", ratio, "between 0 and 1")
        for key in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
            require(isinstance(config.get(key, False), bool), key, config.get(key), "true or false")

    @property
    def compatibles(self) -> list[type[SchedulerSettings]]:
        """The classes of this package that accept this scheduler's config: all samplers of its process.

        diffusers' compatible classes accept it too, and a pipeline accepts them.
        """
        from ldm_lab.diffusion.flow import is_flow  # imported here, as the samplers derive from this class
        from ldm_lab.diffusion.samplers import SAMPLERS

        return [kind for kind in SAMPLERS.values() if is_flow(kind) == is_flow(type(self))]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder/scheduler_config.json`."""
        self.save_config(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None, **overrides: Any) -> Self:  # noqa: ANN401
        """Build from `folder[/subfolder]/scheduler_config.json`, ours or diffusers', or from a name on the hub.

        Keyword arguments replace entries of the config; those in `hub.DOWNLOAD` are for the hub.

        Raises:
            LoadError: the file is missing, is not JSON, or holds an invalid setting.
        """
        download, overrides = hub.split(overrides)
        config = cls.load_config(folder, subfolder, **download)
        with blaming(Path(folder, subfolder or "") / cls.config_name):
            return cls.from_config(config, **overrides)

    @classmethod
    def from_config(cls, config: dict[str, Any], **overrides: Any) -> Self:  # noqa: ANN401
        """Build from the config of any scheduler, ours or diffusers'; keyword arguments replace its entries.

        As in diffusers, settings that were not given to the other scheduler get the defaults of this class, and
        settings that this class lacks stay in its config, for schedulers built from it.
        """
        defaults = config.get("_use_default_values", ())
        values = {key: value for key, value in config.items() if key not in defaults and not key.startswith("_")}
        if values.get("variance_type", "") is None:  # DPM-Solver has no variance
            del values["variance_type"]
        scheduler = super().from_config(values, **overrides)
        others = {key: value for key, value in values.items() if key not in scheduler.config}
        if unknown := sorted(others.keys() - SHARED):
            say_once(f"{cls.__name__} ignores the settings {', '.join(unknown)} of its config: no scheduler has them")
        if others:
            defaults = scheduler.config.get("_use_default_values")
            scheduler.config = FrozenConfig({**others, **scheduler.config}, defaults)
        return scheduler
