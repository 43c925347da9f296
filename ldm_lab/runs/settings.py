"""Types and limits of config keys that no constructor of this package declares, and whether a run may change them.

Constructors declare the same by the annotations of their arguments (see `utils.limits`). An entry here holds only for
its own key, but `Harmless` also holds for all keys below.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from ldm_lab.utils import signatures
from ldm_lab.utils.limits import Count, Given, Harmless, NonNegative, Positive, Probability, Whole
from ldm_lab.utils.moved import HOME, current
from ldm_lab.utils.nested import find, targets

SETTINGS: dict[str, Any] = {
    # of train.py
    "name": Given,
    "stage": Literal["autoencoder", "diffusion"],
    "seed": Whole,
    "max_images": Annotated[Count, Harmless],
    "validate_every": Annotated[Count, Harmless],
    "checkpoint_every": Annotated[Count, Harmless],
    "preview_every": Annotated[Count, Harmless],
    "snapshots": Annotated[Count | None, Harmless],
    "resume": Annotated[Given, Harmless],
    "compile": Annotated[bool, Harmless],
    "plan": Annotated[bool, Harmless],
    "autoencoder": Annotated[Any, Harmless],  # checked by `RunFolder.finished`
    "autoencoder_hash": Annotated[Any, Harmless],
    "plugins": Annotated[Any, Harmless],
    "optimized_metric": Annotated[Given, Harmless],
    "paths": Annotated[Any, Harmless],
    **dict.fromkeys(("paths.runs", "paths.stage", "paths.cache"), Annotated[Given, Harmless]),
    **dict.fromkeys(("paths.cache_limit", "paths.mirror"), Annotated[str | int | None, Harmless]),
    "callbacks": Annotated[Any, Harmless],
    "logger": Annotated[Any, Harmless],
    "trainer": Annotated[Any, Harmless],
    "trainer.precision": Annotated[Any, Harmless],  # checked in `config.checks`
    "trainer.num_nodes": Annotated[Count, Harmless],
    "trainer.gradient_clip_val": NonNegative | None,
    "data.module": Given,
    "data.root": Annotated[Any, Harmless],  # also of plugins: a run knows images by content
    **dict.fromkeys(("data.cache_dir", "data.cache_limit"), Annotated[Any, Harmless]),
    "model.equivariance.probability": Probability,
    "model.optimizer.lr": Positive,
    "model.optimizer.fused": Annotated[bool | None, Harmless],
    "model.schedule.max_images": Annotated[Count, Harmless],  # also of plugins: follows `max_images`
    "model.unet.in_channels": Count | None,  # null: those of the latents
    "model.unet.out_channels": Count | None,
    # of sample.py
    "ckpt": Given,
    "ema": Positive | None,
    "num_samples": Whole,
    "batch_size": Count,
    "sampler.name": Given,
    "sampler.steps": Count,
    "sampler.eta": NonNegative | None,
    "guidance": NonNegative,
    "bit_depth": Literal[8, 16],
    "tiling": bool,
    "slicing": bool,
    "denoising": Whole,
    "interpolate": Given,
    "strength": Given,
    "max_pixels": Count | None,
}


def is_harmless(key: str, config: dict[str, Any]) -> bool:
    """Whether a run may change a setting: data, model and objective stay the same.

    Args:
        key: dotted key.
        config: config that names the classes around `key`. It may come from a stranger's run, so classes of other
            packages are asked only if their module is imported already.
    """
    node, _, name = key.rpartition(".")
    for place in (key, f"{key.split('.')[0]}.{name}"):
        if place in SETTINGS:
            return Harmless in signatures.marks(SETTINGS[place])
    parts = key.split(".")
    parents = (".".join(parts[:count]) for count in range(1, len(parts)))
    hints = (SETTINGS.get(parent) for parent in parents)
    return any(Harmless in signatures.marks(hint) for hint in (*hints, *_arguments(config, node, name)))


def _arguments(config: dict[str, Any], node: str, name: str) -> Iterator[Any]:
    """Yields the annotations of argument `name`: of the class at `node`, or of the classes below if it has none."""
    tree = find(config, node) if node else None
    for target in [tree["_target_"]] if find(tree, "_target_") else [target for _, target in targets(tree)]:
        if (target := current(str(target))).startswith(HOME) or target.rpartition(".")[0] in sys.modules:
            yield signatures.hints(target).get(name)
