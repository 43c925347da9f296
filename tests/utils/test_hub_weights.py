"""Which files of a model on the hub are downloaded: variants, shards, single networks, parts that are given."""

import json
import logging

import pytest
import torch

from ldm_lab import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from ldm_lab.utils import hub
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.terminal import said_once
from tests.helpers import contents
from tests.models.weights import assert_equal_weights
from tests.utils.test_hub import LEGACY, TINY, failure, generate, world  # noqa: F401

UNET, VQVAE = "unet/diffusion_pytorch_model", "vqvae/diffusion_pytorch_model"
CONFIGS = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vqvae/config.json"}


@pytest.fixture
def served(world):  # noqa: F811
    """The paths of a repository that were sent."""

    def of(repository):
        prefix = f"{repository}/"
        return sorted(path.removeprefix(prefix) for path in world.served if path.startswith(prefix))

    return of


def saved(folder, dtype=None, **form):
    LDMPipeline.from_pretrained(TINY, dtype).save_pretrained(folder, **form)
    return contents(folder)


# Variants.


def test_of_two_variants_one_is_downloaded(world, served, tmp_path):  # noqa: F811
    half = {path: body for path, body in saved(tmp_path / "half", "float16", variant="fp16").items() if "fp16" in path}
    world.add("owner/both", contents(TINY) | half)
    assert LDMPipeline.from_pretrained("owner/both", variant="fp16").dtype == torch.float16
    assert served("owner/both") == sorted(CONFIGS | set(half))
    world.served.clear()
    LDMPipeline.from_pretrained("owner/both")
    assert served("owner/both") == [f"{UNET}.safetensors", f"{VQVAE}.safetensors"]


def test_the_only_variant_is_downloaded(world, served, tmp_path, caplog):  # noqa: F811
    said_once.clear()
    files = saved(tmp_path / "half", variant="fp16")
    world.add("owner/half", files)
    with caplog.at_level(logging.WARNING):
        assert_equal_weights(LDMPipeline.from_pretrained("owner/half").unet, LDMPipeline.from_pretrained(TINY).unet)
    assert served("owner/half") == sorted(files)
    assert sum("which are taken" in line for line in caplog.messages) == 2


def test_a_network_without_the_variant(world, served, tmp_path):  # noqa: F811
    UNet2DModel.from_pretrained(TINY, "unet").save_pretrained(tmp_path / "unet", variant="ema")
    averaged = contents(tmp_path)[f"{UNET}.ema.safetensors"]
    world.add("owner/some", contents(TINY) | {f"{UNET}.ema.safetensors": averaged})
    LDMPipeline.from_pretrained("owner/some", variant="ema")
    assert served("owner/some") == sorted({*CONFIGS, f"{UNET}.ema.safetensors", f"{VQVAE}.safetensors"})
    world.served.clear()
    line = failure("owner/some", variant="fp16")
    assert line == "owner/some: variant='fp16': there are no such weights; variants that are there: ema"
    assert not served("owner/some")
    assert failure("owner/tiny", variant="fp16").endswith("variants that are there: none")


# Shards.


@pytest.mark.parametrize("form", [{}, {"variant": "fp16"}, {"safe_serialization": False}])
def test_shards_are_downloaded(world, served, tmp_path, form):  # noqa: F811
    files = saved(tmp_path / "shards", max_shard_size="40KB", **form)
    assert sum(path.startswith("unet/") for path in files) > 3
    other = {f"{UNET}-00009-of-00009.safetensors": b"x", f"{UNET}.msgpack": b"x"}
    world.add("owner/shards", files | other)
    choice = {"variant": form.get("variant"), "use_safetensors": form.get("safe_serialization")}
    pipe = LDMPipeline.from_pretrained("owner/shards", **choice)
    assert_equal_weights(pipe.unet, LDMPipeline.from_pretrained(TINY).unet)
    assert served("owner/shards") == sorted(files)


def test_an_index_fetches_nothing_from_elsewhere(world, served, tmp_path):  # noqa: F811
    files = saved(tmp_path / "shards", max_shard_size="40KB")
    place = f"{UNET}.safetensors.index.json"
    index = json.loads(files[place])
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../secret.safetensors")
    world.add("owner/hostile", files | {place: json.dumps(index).encode(), "secret.safetensors": b"x"})
    with pytest.raises(LoadError, match=r"'../secret.safetensors', which is no name of a file of weights beside it"):
        LDMPipeline.from_pretrained("owner/hostile")
    assert "secret.safetensors" not in served("owner/hostile")


# Formats.


def test_pickled_weights_on_request(world, served):  # noqa: F811
    pickled = {f"{UNET}.bin": contents(LEGACY)[f"{UNET}.bin"], f"{VQVAE}.bin": contents(LEGACY)[f"{VQVAE}.bin"]}
    world.add("owner/full", contents(TINY) | pickled)
    LDMPipeline.from_pretrained("owner/full", use_safetensors=False)
    assert served("owner/full") == sorted(CONFIGS | set(pickled))
    with pytest.raises(LoadError, match=r"no diffusion_pytorch_model.safetensors is there"):
        LDMPipeline.from_pretrained("owner/legacy", use_safetensors=True)
    assert not any(path.endswith(".bin") for path in served("owner/legacy"))


# Single parts.


def test_a_network_of_a_pipeline(served):
    network = UNet2DModel.from_pretrained("owner/tiny", subfolder="unet")
    assert_equal_weights(network, UNet2DModel.from_pretrained(TINY, "unet"))
    assert served("owner/tiny") == ["unet/config.json", f"{UNET}.safetensors"]
    VQModel.from_pretrained("owner/tiny@main", "vqvae", revision="main")
    assert served("owner/tiny")[2:] == ["vqvae/config.json", f"{VQVAE}.safetensors"]


def test_a_network_alone(world, served):  # noqa: F811
    files = {path.name: path.read_bytes() for path in (TINY / "vqvae").iterdir()}
    world.add("owner/one", files | {"deeper/config.json": b"{}", f"deeper/{VQVAE[6:]}.safetensors": b"x"})
    assert_equal_weights(VQModel.from_pretrained("owner/one"), VQModel.from_pretrained(TINY, "vqvae"))
    assert served("owner/one") == sorted(files)


def test_a_network_of_another_pipeline(world, served):  # noqa: F811
    """The autoencoder of Stable Diffusion, say."""
    files = {f"vae/{path.name}": path.read_bytes() for path in (TINY / "vqvae").iterdir()}
    index = json.dumps({"_class_name": "StableDiffusionPipeline"}).encode()
    world.add("owner/text", files | {"model_index.json": index, f"{UNET}.safetensors": b"x", "unet/config.json": b"{}"})
    assert_equal_weights(VQModel.from_pretrained("owner/text", "vae"), VQModel.from_pretrained(TINY, "vqvae"))
    assert served("owner/text") == sorted(files)


def test_a_scheduler(world, served):  # noqa: F811
    scheduler = DDIMScheduler.from_pretrained("owner/tiny", subfolder="scheduler")
    assert scheduler.config == DDIMScheduler.from_pretrained(TINY, "scheduler").config
    assert served("owner/tiny") == ["scheduler/scheduler_config.json"]
    options = {"revision": "main", "token": "hf_mine", "timestep_spacing": "trailing"}
    assert DDIMScheduler.from_pretrained("owner/tiny", "scheduler", **options).config.timestep_spacing == "trailing"
    assert world.tokens[-1] == "Bearer hf_mine"


def test_a_part_that_is_given_is_not_downloaded(world, served):  # noqa: F811
    unet = UNet2DModel.from_pretrained(TINY, "unet")
    pipe = LDMPipeline.from_pretrained("owner/tiny", unet=unet, scheduler=DDIMScheduler())
    assert pipe.unet is unet
    assert served("owner/tiny") == ["model_index.json", "vqvae/config.json", f"{VQVAE}.safetensors"]
    world.refusals["owner/"] = (503, None)
    assert LDMPipeline.from_pretrained("owner/tiny", unet=unet, scheduler=DDIMScheduler()).unet is unet
    with pytest.raises(LoadError, match="owner/tiny: "):
        LDMPipeline.from_pretrained("owner/tiny")


def test_a_pipeline_of_2022(world):  # noqa: F811
    index = json.loads(contents(LEGACY)["model_index.json"]) | {"_class_name": "LatentDiffusionUncondPipeline"}
    world.add("owner/old", contents(LEGACY) | {"model_index.json": json.dumps(index).encode()})
    assert (generate("owner/old") == generate(LEGACY)).all()


# Passed on to the client.


@pytest.mark.parametrize("load", [LDMPipeline.from_pretrained, UNet2DModel.from_pretrained])
def test_the_token_that_is_given(world, load):  # noqa: F811
    options = {"subfolder": "unet"} if load.__self__ is UNet2DModel else {}
    load("owner/tiny", token="hf_mine", **options)
    assert set(world.tokens) == {"Bearer hf_mine"}


def test_what_is_in_the_cache_is_downloaded_again_on_request(world, served, tmp_path):  # noqa: F811
    place = {"subfolder": "unet", "cache_dir": tmp_path / "mine"}
    for force_download in (False, False, True):
        UNet2DModel.from_pretrained("owner/tiny", **place, force_download=force_download)
    assert len(served("owner/tiny")) == 4
    world.asked.clear()
    UNet2DModel.from_pretrained("owner/tiny", **place, local_files_only=True)
    assert not world.asked
    with pytest.raises(LoadError, match="has this model, but no revision 'v9'"):
        UNet2DModel.from_pretrained("owner/tiny", **place, revision="v9")
    with pytest.raises(LoadError, match="revision=v1 is for names on the hub"):
        UNet2DModel.from_pretrained(TINY, "unet", revision="v1")


def test_a_cache_of_an_older_client(world, monkeypatch):  # noqa: F811
    """It has kept no listing of the model: what is there is all there is."""
    import huggingface_hub

    first = hub.fetch("owner/tiny")

    def missing(*_, **__):
        raise huggingface_hub.errors.CachedRepoTreeNotFoundError("no tree")

    monkeypatch.setattr(huggingface_hub, "get_cached_repo_tree", missing)
    assert contents(hub.fetch("owner/tiny", local_files_only=True)) == contents(first) == contents(TINY)
