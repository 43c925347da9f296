"""Base class of schedulers of any process x_t = α x0 + σ ε: the corruption of data, its targets and their inverse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_lab.diffusion.parameterization import Parameterization
from ldm_lab.diffusion.settings import SchedulerSettings
from ldm_lab.utils.outputs import BaseOutput


@dataclass
class SchedulerOutput(BaseOutput):
    """Result of one step, in the shape and dtype of the input sample.

    Attributes:
        prev_sample: the sample at the earlier, less noisy timestep.
        pred_original_sample: the step's prediction of x0.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class Process(SchedulerSettings):
    """Base of all schedulers: `Scheduler`, whose noise levels follow betas, and `FlowScheduler`.

    Attributes:
        timesteps: the timesteps to visit, descending.
        num_inference_steps: their number; `None` before `set_timesteps`.
        order: network evaluations per step.
    """

    order = 1
    timesteps: Tensor
    num_inference_steps: int | None = None

    def __len__(self) -> int:
        """T, `num_train_timesteps`."""
        raise NotImplementedError

    @property
    def parameterization(self) -> Parameterization:
        """The network's prediction type."""
        raise NotImplementedError

    def rates(self, timesteps: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t as float32 tensors that broadcast against `batch`, on its device."""
        raise NotImplementedError

    def training_timesteps(self, drawn: Tensor) -> Tensor:
        """The timesteps of training for `drawn` numbers in 0..T, `(B,)`: see `DrawTimesteps`."""
        raise NotImplementedError

    def fit(self, shape: Sequence[int]) -> None:
        """Adapt settings that depend on the shape of the latents, `(C, h, w)`, before training; here none does."""

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio α_t² / σ_t² at each of `timesteps`, `(B,)`, float32, on their device."""
        alpha, sigma = self.rates(timesteps, timesteps)
        return (alpha / sigma).square()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Draw from q(x_t | x0): x_t = α_t x0 + σ_t ε (Ho et al. 2020, eq. 4; "q_sample").

        Args:
            original_samples: x0, `(B, ...)`.
            noise: ε, standard normal, of the same shape.
            timesteps: `(B,)`, in the range of `rates`.

        Returns:
            x_t in the shape and dtype of x0; computed in float32 or higher.
        """
        alpha, sigma = self.rates(timesteps, original_samples)
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def get_target(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The training target of the prediction type, shapes and dtype as in `add_noise`."""
        alpha, sigma = self.rates(timesteps, original_samples)
        return self.parameterization.target(original_samples, noise, alpha, sigma).to(original_samples.dtype)

    def predict_x0(self, model_output: Tensor, timesteps: Tensor, sample: Tensor) -> Tensor:
        """The clean sample from a prediction at x_t = `sample`, neither clipped nor thresholded.

        Args:
            model_output: `(B, ...)`.
            timesteps: `(B,)`, in the range of `rates`.
            sample: x_t, `(B, ...)`.
        """
        x_t = at_least_float32(sample)
        x0, _ = self.parameterization.x0_and_epsilon(model_output.to(x_t.dtype), x_t, *self.rates(timesteps, sample))
        return x0.to(sample.dtype)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The network's input for `sample`: the sample itself."""
        return sample

    @staticmethod
    def _result(x_prev: Tensor, x0: Tensor, dtype: torch.dtype, return_dict: bool) -> SchedulerOutput | tuple:
        output = SchedulerOutput(x_prev.to(dtype), x0.to(dtype))
        return output if return_dict else output.to_tuple()


def at_least_float32(sample: Tensor) -> Tensor:
    """`sample` in float32 or higher: half precision becomes float32."""
    return sample.to(torch.promote_types(sample.dtype, torch.float32))
