"""What people who know the namesake do with a pipeline: its switches, seeds, numbers, wrappers."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from ldm_lab import DDPMScheduler, LDMPipeline, UNet2DModel, VQModel
from ldm_lab.utils.terminal import said_once
from tests.helpers import GOLDEN
from tests.models.weights import assert_equal_weights

TINY = GOLDEN / "diffusers/ldm_tiny"


def load(folder=TINY, kind=LDMPipeline):
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return load()


@pytest.fixture
def said(caplog):
    said_once.clear()
    caplog.set_level(logging.WARNING)
    return lambda: caplog.messages


def draw(pipe, generator=3, **options):
    return pipe(**{"batch_size": 2, "num_inference_steps": 2, "output_type": "np", "generator": generator, **options})[
        0
    ]


# Switches.


def test_switches_of_the_decoder_do_their_work(pipe):
    pipe.enable_vae_slicing()
    pipe.enable_vae_tiling()
    assert pipe.vqvae.slicing
    assert pipe.vqvae.tiles is not None
    pipe.disable_vae_slicing()
    pipe.disable_vae_tiling()
    assert not pipe.vqvae.slicing
    assert pipe.vqvae.tiles is None


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("attention_slicing", (), "enable_attention_slicing has no effect: attention is torch's scaled_dot_product"),
        ("attention_slicing", ("max",), "enable_attention_slicing has no effect"),
        ("attention_slicing", (1,), "enable_attention_slicing has no effect"),
        ("xformers_memory_efficient_attention", (), "attention is torch's scaled_dot_product_attention"),
    ],
)
def test_switches_without_effect_say_so_once(pipe, said, name, arguments, words):
    images = draw(pipe)
    for _ in range(2):
        getattr(pipe, f"enable_{name}")(*arguments)
    assert len(said()) == 1
    assert words in said()[0]
    assert np.array_equal(draw(pipe), images)
    getattr(pipe, f"disable_{name}")()
    assert len(said()) == 1


@pytest.mark.parametrize("name", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_runs_where_the_namesake_would(pipe, said, name, monkeypatch):
    """There the networks stay on the CPU and are moved for each call: whoever asks for that moves nothing."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("meta"))
    getattr(pipe, name)()
    assert {pipe.unet.device.type, pipe.vqvae.device.type} == {"meta"}
    assert said() == [
        "nothing is offloaded: the networks, 0.0 GB, stay on meta;"
        " enable_vae_slicing() and enable_vae_tiling() save what decoding takes"
    ]
    other = load()
    getattr(other, name)(device="cpu")
    assert other.device.type == "cpu"
    getattr(other, name)(gpu_id=0, device="cpu")
    assert draw(other).shape == (2, 32, 32, 3)


# Arguments of a call.


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, torch.tensor])
def test_whole_numbers_of_any_library(pipe, kind):
    images = draw(pipe, batch_size=kind(2), num_inference_steps=kind(3))
    assert np.array_equal(images, draw(pipe, batch_size=2, num_inference_steps=3))


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", None, np.float32(2), np.array([1, 2])])
@pytest.mark.parametrize("key", ["batch_size", "num_inference_steps"])
def test_what_is_no_number_of_images_or_steps(pipe, key, value):
    with pytest.raises(ValueError, match=rf"^{key} is .*, must be a positive integer$"):
        draw(pipe, **{key: value})


@pytest.mark.parametrize("seed", [0, np.int64(0), torch.tensor(0), 2**63, -1])
def test_a_seed_is_a_generator(pipe, seed):
    for eta in (0.0, 1.0):
        torch.manual_seed(1)
        images = draw(pipe, seed, eta=eta)
        torch.manual_seed(2)
        assert np.array_equal(draw(pipe, torch.Generator().manual_seed(int(seed)), eta=eta), images)
        assert not np.array_equal(draw(pipe, 5, eta=eta), images)
    assert torch.equal(pipe.noise(1, seed), pipe.noise(1, torch.Generator().manual_seed(int(seed))))


def test_a_seed_for_each_image(pipe):
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    images = draw(pipe, [1, np.int32(2)])
    assert np.array_equal(draw(pipe, tuple(torch.Generator().manual_seed(seed) for seed in (1, 2))), images)
    with pytest.raises(ValueError, match="generator: 3 given for a batch of 2"):
        draw(pipe, [1, 2, 3])


@pytest.mark.parametrize("value", ["0", 1.5, 2**64, [1, "a"], {"seed": 0}])
def test_what_is_neither_a_generator_nor_a_seed(pipe, value):
    with pytest.raises(ValueError, match=r"^generator=.*: give a torch.Generator or a seed") as error:
        draw(pipe, value)
    assert "\n" not in str(error.value)


def test_numpy_by_both_names(pipe):
    assert np.array_equal(draw(pipe, output_type="numpy"), draw(pipe))


# What a pipeline has.


def test_bars_over_a_count_and_over_a_list(pipe, capsys):
    pipe.set_progress_bar_config(desc="drawing")
    assert list(pipe.progress_bar([4, 5, 6])) == [4, 5, 6]
    with pipe.progress_bar(total=2) as bar:
        bar.update(2)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "2/2" in shown


def test_arrays_become_pictures(pipe):
    images = draw(pipe)
    pictures = pipe.numpy_to_pil(images)
    assert [picture.tobytes() for picture in pictures] == [
        picture.tobytes() for picture in draw(pipe, output_type="pil")
    ]
    (single,) = LDMPipeline.numpy_to_pil(images[0])
    assert single.tobytes() == pictures[0].tobytes()
    (grey,) = pipe.numpy_to_pil(images[:1, ..., :1])
    assert grey.mode == "L"


def test_parts_are_registered(pipe):
    scheduler, vqvae = DDPMScheduler(), VQModel.from_pretrained(TINY, "vqvae")
    pipe.register_modules(scheduler=scheduler, vqvae=vqvae)
    assert (pipe.scheduler, pipe.components["vqvae"]) == (scheduler, vqvae)
    with pytest.raises(TypeError, match="LDMPipeline has no part 'text_encoder'; it has vqvae, unet, scheduler"):
        pipe.register_modules(text_encoder=None)


@pytest.mark.parametrize(
    "move",
    [
        lambda pipe: pipe.to("meta", torch.float16),
        lambda pipe: pipe.to(torch.device("meta"), torch.float16),
        lambda pipe: pipe.to(torch.float16).to("meta"),
        lambda pipe: pipe.to(device="meta", dtype=torch.float16),
        lambda pipe: pipe.to("meta", dtype=torch.float16),
    ],
)
def test_every_way_to_move(pipe, move):
    assert move(pipe) is pipe
    assert (pipe.device.type, pipe.dtype) == ("meta", torch.float16)
    assert (pipe.vqvae.device.type, pipe.vqvae.dtype) == ("meta", torch.float16)


# Compiled and wrapped networks.


def compiled(network):
    """Nothing is compiled before a call."""
    return torch.compile(network)


def half_compiled(network):
    name = "decoder" if isinstance(network, VQModel) else "mid_block"
    setattr(network, name, torch.compile(getattr(network, name)))
    return network


WRAPPERS = {
    "compiled": compiled,
    "wrapped": nn.DataParallel,
    "both": lambda network: nn.DataParallel(compiled(network)),
    "a part": half_compiled,
    "all": lambda network: compiled(half_compiled(network)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_compiled_network_is_written_as_it_was_before(wrap, tmp_path):
    pipe, expected = load(), load()
    pipe.unet, pipe.vqvae = wrap(pipe.unet), wrap(pipe.vqvae)
    pipe.save_pretrained(tmp_path)
    back = load(tmp_path)
    assert (type(back.unet), type(back.vqvae)) == (UNet2DModel, VQModel)
    assert_equal_weights(back.unet, expected.unet)
    assert_equal_weights(back.vqvae, expected.vqvae)
    theirs = load(tmp_path, pytest.importorskip("diffusers").LDMPipeline)
    assert_equal_weights(theirs.unet, expected.unet)


def test_a_process_group_is_unwrapped(tmp_path):
    from torch import distributed

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        pipe = load()
        pipe.unet = nn.parallel.DistributedDataParallel(pipe.unet)
        pipe.save_pretrained(tmp_path / "folder")
    finally:
        distributed.destroy_process_group()
    assert_equal_weights(load(tmp_path / "folder").unet, load().unet)


@pytest.mark.parametrize("wrap", [compiled, half_compiled])
def test_a_single_network_too(wrap, tmp_path):
    for place, kind in (("unet", UNet2DModel), ("vqvae", VQModel)):
        wrap(kind.from_pretrained(TINY, place)).save_pretrained(tmp_path / place, max_shard_size="40KB")
        assert_equal_weights(kind.from_pretrained(tmp_path / place), kind.from_pretrained(TINY, place))
