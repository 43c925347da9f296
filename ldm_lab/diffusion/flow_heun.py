"""Heun steps of flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldm_lab.diffusion.flow import FlowScheduler
from ldm_lab.diffusion.process import SchedulerOutput
from ldm_lab.utils.configurable import register_to_config
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.limits import Count, Positive


class Begun(NamedTuple):
    """A step whose second evaluation is due: where it began, the velocity there, and its length t_prev - t."""

    x_t: Tensor
    velocity: Tensor
    length: float


class FlowMatchHeunDiscreteScheduler(FlowScheduler):
    """Steps of second order: the mean of the velocities at both ends of a step, so two network evaluations each.

    The last step, to clean data, is an Euler step with one evaluation (Karras et al. 2022, arXiv 2206.00364, algorithm
    1); with an even number of evaluations so is the first step, where the path is the straightest. The scheduler stores
    the first half of a step, so timesteps must be visited in order; a new first step clears it.

    `set_timesteps` counts evaluations. diffusers' class counts levels: its N are 2 N - 1 here.

    >>> scheduler = FlowMatchHeunDiscreteScheduler()
    >>> scheduler.set_timesteps(5)
    >>> scheduler.timesteps
    tensor([1000.0000,  500.5000,  500.5000,    1.0000,    1.0000])

    Arguments: see `FlowScheduler`.

    Raises:
        UserError: a value is out of range.
    """

    order = 2

    @register_to_config
    def __init__(self, num_train_timesteps: Count = 1000, shift: Positive | Literal["latents"] = 1.0) -> None:
        super().__init__()

    def _levels(self, count: int) -> int:
        return count // 2 + 1

    def _evaluations(self, count: int | None, levels: int) -> list[int]:
        self._begun: Begun | None = None
        self._due = 0
        self._single = {levels - 1} if count is None or count % 2 else {0, levels - 1}  # Euler steps
        steps = [[level] if level in self._single else [level, level + 1] for level in range(levels)]
        self._from = [level for level, ends in enumerate(steps) for _ in ends]  # where each evaluation's step begins
        self._at = [end for ends in steps for end in ends]  # the level of each evaluation
        return self._at

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Half a step, in float32 or higher: x' = x_t + h v(x_t), then x_prev = x_t + h (v(x_t) + v(x')) / 2.

        Args:
            model_output: v, the network's prediction at `sample`, `(B, ...)`.
            timestep: t T, the next one of `timesteps`; any of them for the first step. A tensor on a GPU makes the
                host wait.
            sample: x_t, or x' in the second half of a step, `(B, ...)`.
            generator: unused.
            variance_noise: unused.
            return_dict: `False` returns a plain tuple.

        Raises:
            UserError: t is out of order, or not in the list; or the shapes differ.
        """
        place = self._place(timestep)
        velocity, x_t = self._checked(model_output, sample)
        level = self._from[place]
        t, t_prev = self._sigma[level : level + 2]
        if self._begun is None:
            x0, x_prev = x_t - t * velocity, x_t + (t_prev - t) * velocity
            if level not in self._single:
                self._begun = Begun(x_t, velocity, t_prev - t)
        else:
            x0, (start, first, length) = x_t - t_prev * velocity, self._begun
            x_prev, self._begun = start + length * 0.5 * (first + velocity), None
        self._due = place + 1
        return self._result(x_prev, x0, sample.dtype, return_dict)

    def _place(self, timestep: Tensor | float) -> int:
        """Index of this evaluation in the list. The second half of a step must follow its first half."""
        first = self._index(timestep)
        due = self._due if self._due < len(self._visited) else 0
        if self._visited[due] == self._visited[first]:
            return due
        if first and due:
            raise UserError(
                f"timestep={self._visited[first]:g}, but {self._visited[due]:g} is due: Heun's steps have two halves"
            )
        self._begun = None
        return self._from.index(self._at[first])  # the step from that level, not the end of the step to it
