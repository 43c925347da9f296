"""Pretrained extractors: weights from a local file, read as data, and a line where they cannot be had."""

from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F

from ldm_lab.metrics import dinov2, features
from ldm_lab.metrics.dinov2 import DINOv2, ViT
from ldm_lab.metrics.extractors import Inception, rgb_8_bit
from ldm_lab.metrics.images import to_networks
from ldm_lab.utils.reading import LoadError
from tests.helpers import Malicious

fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
TINY = {"width": 32, "depth": 2, "heads": 4}


def no_network(*_, **__):
    raise URLError("no route to host")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", no_network)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)


@pytest.mark.slow
def test_inception_takes_its_weights_from_a_file(tmp_path, monkeypatch):
    with monkeypatch.context() as patched, torch.random.fork_rng():
        torch.manual_seed(0)
        patched.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patched.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        theirs = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = Inception(tmp_path / "weights.pth")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(images), theirs(images)[0])
    assert ours(images).shape == (2, Inception.dimension)
    assert len(ours.fingerprint()) == 16


@pytest.mark.parametrize("kind", [Inception, DINOv2])
def test_weights_that_cannot_be_had_end_in_a_line_that_says_what_to_do(kind):
    with pytest.raises(ValueError, match=r"cannot be had .*no route.*--weights FILE.*--features own") as error:
        kind()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [Inception, DINOv2])
def test_a_file_of_other_weights_ends_in_one_line(tmp_path, kind):
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(LoadError, match=r"weights\.pth: holds no weights of") as error:
        kind(tmp_path / "weights.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [Inception, DINOv2])
def test_a_file_of_weights_runs_no_code(tmp_path, kind):
    torch.save({"a": Malicious(tmp_path / "run")}, tmp_path / "weights.pth")
    with pytest.raises(LoadError, match=r"weights\.pth"):
        kind(tmp_path / "weights.pth")
    assert not (tmp_path / "run").exists()


def test_without_torch_fidelity_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[metrics\]'"):
        Inception()


def tiny_weights(path):
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(value.shape, generator=generator) / 6 for key, value in ViT(**TINY).state_dict().items()}
    torch.save({**state, "mask_token": torch.zeros(1, 32)}, path)  # as published
    return state


def test_dinov2_is_its_formula(tmp_path):
    """Against a transformer of torch's, whose blocks have no LayerScale, with the scales folded into its weights."""
    state = tiny_weights(tmp_path / "weights.pth")
    extractor = DINOv2(tmp_path / "weights.pth", **TINY)
    image = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    x = (image / 255 - torch.tensor(DINOv2.MEAN).view(3, 1, 1)) / torch.tensor(DINOv2.STD).view(3, 1, 1)
    tokens = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], 14).flatten(2).mT
    tokens = torch.cat([state["cls_token"], tokens], 1) + extractor.network.positions((16, 16))
    for block in ("blocks.0.", "blocks.1."):
        part = {key.removeprefix(block): value for key, value in state.items() if key.startswith(block)}
        layer = torch.nn.TransformerEncoderLayer(
            32, 4, 128, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        )
        scale1, scale2 = part["ls1.gamma"], part["ls2.gamma"]
        layer.load_state_dict({
            "self_attn.in_proj_weight": part["attn.qkv.weight"], "self_attn.in_proj_bias": part["attn.qkv.bias"],
            "self_attn.out_proj.weight": scale1[:, None] * part["attn.proj.weight"],
            "self_attn.out_proj.bias": scale1 * part["attn.proj.bias"],
            "linear1.weight": part["mlp.fc1.weight"], "linear1.bias": part["mlp.fc1.bias"],
            "linear2.weight": scale2[:, None] * part["mlp.fc2.weight"], "linear2.bias": scale2 * part["mlp.fc2.bias"],
            **{f"norm{i}.{kind}": part[f"norm{i}.{kind}"] for i in (1, 2) for kind in ("weight", "bias")},
        })  # fmt: skip
        tokens = layer(tokens)
    expected = F.layer_norm(tokens[:, 0], (32,), state["norm.weight"], state["norm.bias"], 1e-6)
    assert torch.allclose(extractor(image), expected, atol=1e-5)


def test_positions_keep_their_place_when_they_are_resized(tmp_path):
    tiny_weights(tmp_path / "weights.pth")
    network = DINOv2(tmp_path / "weights.pth", **TINY).network
    assert network.positions((16, 16)).shape == (1, 257, 32)
    grid = torch.linspace(0, 1, 37).expand(32, 37, 37)  # grows to the right
    network.pos_embed[:, 1:] = grid.flatten(1).T
    resized = network.positions((16, 16))[0, 1:].T.unflatten(1, (16, 16))
    assert torch.allclose(resized[:, :1], resized[:, :1].expand(-1, 16, -1)[:, :1])
    assert (resized.diff(dim=2) > 0).all()
    assert resized.diff(dim=1).abs().max() < 1e-5


def test_the_published_architecture_has_its_number_of_parameters():
    with torch.device("meta"):
        network = ViT(1024, 24, 16)
    assert sum(p.numel() for p in network.parameters()) == 304_368_640 - 1024  # as published, without the mask token


def test_grey_and_deep_images_become_8_bit_rgb():
    images = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    rgb = images.expand(-1, 3, -1, -1)
    assert torch.equal(rgb_8_bit(images), rgb)
    assert torch.equal(rgb_8_bit(to_networks(images)), rgb)
    assert torch.equal(rgb_8_bit(rgb.contiguous()), rgb)


def test_features_are_named_and_own_ones_take_no_weights():
    with pytest.raises(ValueError, match="there are own, inception, dinov2"):
        features.check("clip", None)
    with pytest.raises(ValueError, match="take none"):
        features.check("own", "weights.pth")
    with pytest.raises(ValueError, match=r"features=dinov2: sees RGB or grey, not 5 channels; own features take any"):
        features.check("dinov2", None, channels=5)
    features.check("own", None, channels=5)
    assert dinov2.URL.endswith("dinov2_vitl14_pretrain.pth")
