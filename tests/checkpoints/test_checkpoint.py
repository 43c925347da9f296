"""Training checkpoints: written whole, read without running anything, and complete enough to be sampled from."""

import copy
import json
import os
import zipfile

import pytest
import torch
from torch import nn

from ldm_lab import AutoencoderKL, LDMPipeline, UNet2DModel, VQModel
from ldm_lab.checkpoints import checkpoint
from ldm_lab.models.autoencoders import FIRST_STAGES, load_autoencoder
from ldm_lab.training.autoencoder_module import AutoencoderModule
from ldm_lab.training.diffusion_module import DiffusionModule
from ldm_lab.training.ema import EMA
from ldm_lab.utils.reading import LoadError
from tests.helpers import GOLDEN, Malicious
from tests.models.weights import assert_equal_weights

FOLDER = GOLDEN / "diffusers" / "ldm_tiny"
TRAINING = {"optimizer": None, "schedule": None}
FIRST_STAGES = tuple(FIRST_STAGES.values())
BOTH = {"vqvae": FIRST_STAGES, "unet": (UNet2DModel,)}


def rebuilt(path, *names):
    """Networks of a checkpoint, both where none is named."""
    parts = checkpoint.parts(path)
    return {name: checkpoint.network(parts, name, BOTH[name], (), str(path)) for name in names or BOTH}


def state_of(module):
    """What Lightning hands over for writing."""
    state = {"state_dict": module.state_dict(), "optimizer_states": [{}]}
    module.on_save_checkpoint(state)
    return state


@pytest.fixture(scope="module")
def pipe():
    return LDMPipeline.from_pretrained(FOLDER)


@pytest.fixture
def diffusion(pipe):
    """A stage 2 whose average is the recorded UNet, and whose raw weights are something else."""
    parts = copy.deepcopy(pipe.components)
    module = DiffusionModule(parts["unet"], parts["vqvae"], parts["scheduler"], objective=None, ema=EMA, **TRAINING)
    module.ema.model.load_state_dict(pipe.unet.state_dict())
    module.autoencoder.register_to_config(scaling_factor=0.75)
    module.images_seen = 20_000_001
    return module


@pytest.fixture
def autoencoder(pipe):
    parts = {"loss": nn.Linear(1, 1), "codebook": nn.Linear(1, 1)}
    return AutoencoderModule(copy.deepcopy(pipe.vqvae), **parts, **TRAINING)


@pytest.fixture
def file(diffusion, tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.save(state_of(diffusion), path)
    return path


def test_there_and_back(diffusion, file):
    back = checkpoint.load(file)
    expected = state_of(diffusion)
    assert back.keys() == expected.keys()
    assert back[checkpoint.ENTRY] == expected[checkpoint.ENTRY]
    assert all(torch.equal(back["state_dict"][key], value) for key, value in expected["state_dict"].items())


def test_saving_replaces_the_whole_file_or_nothing(diffusion, tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    checkpoint.save(state_of(diffusion), path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save({**state_of(diffusion), "more": lambda: None}, path)
    assert path.read_bytes() == before
    diffusion.images_seen = 5
    checkpoint.save(state_of(diffusion), str(path))
    assert checkpoint.describe(path)["images_seen"] == 5
    assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_describes_itself(diffusion, file):
    entry = checkpoint.describe(file)
    assert (entry["stage"], entry["images_seen"]) == ("diffusion", 20_000_001)
    assert entry["configs"]["unet"] == {"_class_name": "UNet2DModel", **diffusion.unet.config}
    assert entry["configs"]["vqvae"] == {"_class_name": "VQModel", **diffusion.autoencoder.config}
    assert entry["configs"]["scheduler"] == {"_class_name": "DDIMScheduler", **diffusion.scheduler.config}
    assert json.loads(json.dumps(entry)) == entry  # plain data


def test_networks_are_rebuilt_bit_for_bit_with_averaged_weights(pipe, diffusion, file):
    networks = rebuilt(file)
    assert_equal_weights(networks["unet"], pipe.unet)
    assert not torch.equal(diffusion.unet.conv_out.weight, pipe.unet.conv_out.weight)
    assert_equal_weights(networks["vqvae"], pipe.vqvae)
    assert networks["vqvae"].config.scaling_factor == 0.75
    assert not any(network.training for network in networks.values())


def test_a_stage_1_holds_no_unet(autoencoder, tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.save(state_of(autoencoder), path)
    assert_equal_weights(rebuilt(path, "vqvae")["vqvae"], autoencoder.autoencoder)
    with pytest.raises(LoadError, match="this checkpoint holds no unet, only vqvae"):
        rebuilt(path)


def test_a_checkpoint_with_a_missing_tensor(diffusion, tmp_path):
    state = state_of(diffusion)
    del state["state_dict"]["ema.model.conv_out.bias"]
    checkpoint.save(state, tmp_path / "last.ckpt")
    with pytest.raises(LoadError, match=r"last.ckpt: no tensor 'conv_out.bias' for this UNet2DModel \(1 missing\)"):
        rebuilt(tmp_path / "last.ckpt")


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("length", [0, 1, 100, 5000, -1])
def test_a_truncated_checkpoint(file, length, mmap):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(LoadError, match=r"last.ckpt: ") as error:
        checkpoint.load(file, mmap)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{}, [], {"state_dict": {}}, {"ldm_lab": {}}, {"ldm_lab": 3, "state_dict": {}}])
def test_another_file_of_torch(content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(LoadError, match=r"model.pt: not a training checkpoint of ldm_lab"):
        checkpoint.load(tmp_path / "model.pt")


def test_no_file(tmp_path):
    with pytest.raises(LoadError, match=f"^{tmp_path}/no.ckpt: no such file$"):
        checkpoint.load(tmp_path / "no.ckpt")


@pytest.mark.parametrize("read", [checkpoint.load, checkpoint.describe, load_autoencoder])
def test_nothing_in_a_file_is_run(diffusion, tmp_path, read):
    path, proof = tmp_path / "last.ckpt", tmp_path / "proof"
    checkpoint.save({**state_of(diffusion), "callbacks": Malicious(proof)}, path)
    with pytest.raises(LoadError, match="could run code and is not loaded") as error:
        read(path)
    assert "\n" not in str(error.value)
    assert not proof.exists()

    torch.load(path, weights_only=False)["callbacks"].close()
    assert proof.exists(), "the file is harmless: what stands above proves nothing"


# What is found in a run folder: <run>/<stage>/checkpoints/last.ckpt, final/, status.json; the pipeline in <run> itself.


@pytest.fixture
def run(pipe, autoencoder, diffusion, tmp_path):
    """A run whose second stage is not finished."""
    run = tmp_path / "run"
    autoencoder.autoencoder.save_pretrained(run / "autoencoder" / "final")
    checkpoint.save(state_of(autoencoder), run / "autoencoder" / "checkpoints" / "last.ckpt")
    checkpoint.save(state_of(diffusion), run / "diffusion" / "checkpoints" / "last.ckpt")
    return run


def write_status(run, finished):
    (run / "diffusion" / checkpoint.STATUS).write_text(json.dumps({"finished": finished}))


def test_a_pipeline_of_a_run_that_is_not_finished(pipe, run):
    for source in (run, run / "diffusion", run / "diffusion" / "checkpoints" / "last.ckpt"):
        loaded = LDMPipeline.from_pretrained(source)
        assert_equal_weights(loaded.unet, pipe.unet)
        assert_equal_weights(loaded.vqvae, pipe.vqvae)
        assert loaded.vqvae.config.scaling_factor == 0.75
        assert loaded.scheduler.config == pipe.scheduler.config
    with pytest.raises(LoadError, match="this checkpoint holds no unet"):
        LDMPipeline.from_pretrained(run / "autoencoder")


def test_a_run_that_goes_on_is_sampled_from_its_newest_state(pipe, run):
    pipe.save_pretrained(run)  # has another scaling factor than the checkpoint
    for finished, expected in ((True, 1.0), (False, 0.75)):
        write_status(run, finished)
        assert LDMPipeline.from_pretrained(run).vqvae.config.scaling_factor == expected


def test_a_first_stage_from_everything_that_holds_one(pipe, run, file, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    sources = [
        run,
        run / "autoencoder",
        run / "autoencoder" / "final",
        run / "autoencoder" / "checkpoints" / "last.ckpt",
        file,
        tmp_path / "pipeline",
        str(tmp_path / "pipeline" / "vqvae"),
    ]
    for source in sources:
        assert_equal_weights(load_autoencoder(source), pipe.vqvae)


def test_no_first_stage(run, tmp_path):
    for source in (tmp_path / "nowhere", run / "diffusion"):
        with pytest.raises(LoadError, match=f"^{source}: there is no first stage here"):
            load_autoencoder(source)
    with pytest.raises(LoadError, match=r"config.json: the first stage is UNet2DModel; known are VQModel, Autoenc"):
        load_autoencoder(FOLDER / "unet")


@pytest.fixture
def kl_model():
    torch.manual_seed(0)
    return AutoencoderKL(norm_num_groups=4, block_out_channels=[8], latent_channels=3, scaling_factor=0.5).eval()


def test_a_first_stage_with_a_gaussian_from_everything_that_holds_one(kl_model, pipe, tmp_path):
    module = DiffusionModule(
        copy.deepcopy(pipe.unet), kl_model, pipe.scheduler, objective=None, ema=EMA, scaling_factor=0.5, **TRAINING
    )
    checkpoint.save(state_of(module), tmp_path / "last.ckpt")
    assert checkpoint.describe(tmp_path / "last.ckpt")["configs"]["vqvae"]["_class_name"] == "AutoencoderKL"
    kl_model.save_pretrained(tmp_path / "model")
    kl_model.save_pretrained(tmp_path / "run" / "autoencoder" / "final")
    kl_model.save_pretrained(tmp_path / "like stable diffusion" / "vae")
    LDMPipeline(kl_model, pipe.unet, pipe.scheduler).save_pretrained(tmp_path / "pipeline")
    for source in ("last.ckpt", "model", "run", "like stable diffusion", "pipeline"):
        loaded = load_autoencoder(tmp_path / source)
        assert type(loaded) is AutoencoderKL
        assert loaded.config == kl_model.config
        assert_equal_weights(loaded, kl_model)
    assert type(LDMPipeline.from_pretrained(tmp_path / "last.ckpt").vqvae) is AutoencoderKL


def test_a_folder_of_stable_diffusion(kl_model, tmp_path):
    """Its config has other keys than ours writes, all of them at values without an effect."""
    kl_model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    kept = {key: written[key] for key in ("block_out_channels", "norm_num_groups", "latent_channels")}
    neutral = {
        "latents_mean": None,
        "latents_std": None,
        "shift_factor": None,
        "force_upcast": True,
        "sample_size": 512,
    }
    foreign = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", "_name_or_path": "x", "act_fn": "silu"}
    (tmp_path / "config.json").write_text(json.dumps({**kept, **neutral, **foreign}))
    loaded = load_autoencoder(tmp_path)
    assert_equal_weights(loaded, kl_model)
    assert loaded.config.scaling_factor == 0.18215


def test_a_checkpoint_from_before_classes_were_named(diffusion, tmp_path):
    state = state_of(diffusion)
    for config in state[checkpoint.ENTRY]["configs"].values():
        config.pop("_class_name", None)
    checkpoint.save(state, tmp_path / "last.ckpt")
    assert type(LDMPipeline.from_pretrained(tmp_path / "last.ckpt").vqvae) is VQModel


def test_a_fingerprint_is_of_the_values(pipe, tmp_path):
    own = checkpoint.fingerprint(pipe.vqvae)
    pipe.vqvae.save_pretrained(tmp_path)
    assert checkpoint.fingerprint(VQModel.from_pretrained(tmp_path)) == own
    assert own != checkpoint.fingerprint(pipe.unet)
    assert len(own) == 16
    half = copy.deepcopy(pipe.vqvae).bfloat16()
    assert checkpoint.fingerprint(half) == checkpoint.fingerprint(copy.deepcopy(half).float()) != own


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.weight.data[0, 0].add_(1e-6),
        lambda net: net.count.add_(1),
        lambda net: net.weight.data.copy_(net.weight.data.flip(0)),
        lambda net: setattr(net, "weight", nn.Parameter(net.weight.data.view(3, 2))),
        lambda net: net.register_buffer("more", torch.zeros(1)),
        lambda net: net.register_buffer("count", None),
    ],
    ids=["a value", "a counter", "their order", "a shape", "one more", "one less"],
)
def test_a_fingerprint_changes_with(change):
    network = nn.Linear(3, 2, bias=False)
    network.register_buffer("count", torch.tensor(3))
    before = checkpoint.fingerprint(network)
    assert checkpoint.fingerprint(copy.deepcopy(network)) == before
    change(network)
    assert checkpoint.fingerprint(network) != before


def test_a_file_is_verified_once_until_it_changes(file, monkeypatch):
    verified, testzip = [], zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda archive: verified.append(1) or testzip(archive))
    for _ in range(2):  # too young: a change in the same tick of the clock would not show
        checkpoint.load(file)
    assert len(verified) == 2
    os.utime(file, (1, 1))
    for _ in range(3):
        checkpoint.load(file)
    assert len(verified) == 3
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, (2, 2))
    with pytest.raises(LoadError, match="damaged"):
        checkpoint.load(file)
