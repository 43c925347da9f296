"""The keys of a command are set as Hydra's own composition sets them."""

import re

import pytest

from ldm_lab.config.bases import base, composed, settable
from ldm_lab.config.files import ConfigError
from ldm_lab.config.overrides import apply, parse_overrides

GROUPS = ("experiment=celebahq/diffusion",)


@pytest.fixture
def config():
    return settable(base("train", GROUPS))


@pytest.mark.parametrize(
    "lines",
    [
        ["seed=7", "model.ema.decay=0.5", "name='a (b)'", "data.image_size=[16,24]"],
        ["+model.new.key={a: 1, b: [x, null]}", "++seed=3", "++model.other=1e-3", "logger.wandb.tags=[a,b]"],
        ["~callbacks.throughput", "~logger.wandb=null", "~data.global_batch_size"],
        ["model.ema={decay: 0.25}", "data.root=${paths.cache}", "max_images=250k", "name=${paths.runs}"],
        ["+callbacks.mine._target_=a.B", "+callbacks.mine.x=true", "+data.list=[1]", "+data.list=[2]"],
    ],
)
def test_keys_are_set_as_hydra_sets_them(config, lines):

    for override in parse_overrides(lines):
        apply(override, config)
    assert config == composed("train", [*GROUPS, *lines])


@pytest.mark.parametrize("line", ["+seed=1", "~model.nothing", "~seed=5", "seed@here=1", "seed.a=1", "none=1"])
def test_keys_that_hydra_refuses_are_refused(config, line):
    (override,) = parse_overrides([line])
    with pytest.raises(ConfigError, match=re.escape(line)):
        apply(override, config)
    with pytest.raises(ConfigError):
        composed("train", [*GROUPS, line])
