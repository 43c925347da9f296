"""Channels lie as the device wants them, on a CPU innermost, in the weights and in every feature map."""

import copy
import functools

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm_lab import UNet2DModel, VQModel
from ldm_lab.models import layout
from ldm_lab.models.discriminator import PatchDiscriminator
from ldm_lab.models.kl_model import AutoencoderKL
from ldm_lab.training.ema import EMA

CONV, ATTN, RES = "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"
WIDTHS = {"block_out_channels": (8, 16, 24), "norm_num_groups": 4}
NETWORKS = {
    "unet": lambda: UNet2DModel(
        **WIDTHS, down_block_types=(RES, ATTN, CONV), attention_head_dim=4, layers_per_block=1,
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    ),
    "vq": lambda: VQModel(
        block_out_channels=(8, 16), norm_num_groups=4, num_vq_embeddings=8, latent_channels=3,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    ),
    "kl": lambda: AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    "discriminator": lambda: PatchDiscriminator(channels=8),
}  # fmt: skip


def channels_innermost(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last)


def run(network, images):
    """Once through, both ways for an autoencoder."""
    if isinstance(network, UNet2DModel):
        return network(images, 5).sample
    if isinstance(network, PatchDiscriminator):
        return network(images)
    return network.decode(network.from_moments(network.moments(images))).sample


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_layer_turns_a_feature_map_over(name, training):
    network = NETWORKS[name]().train(training)
    seen = []

    def look(layer, inputs, output):
        seen.append((layer, channels_innermost(inputs[0]), channels_innermost(output)))

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm | nn.BatchNorm2d):
            module.register_forward_hook(look)
    # 3 channels of 40 x 40: past the size from which upsampling is one transposed convolution
    run(network, torch.rand(2, 3, 40, 40))
    assert len(seen) > 5
    assert all(output for _, _, output in seen)
    # Images and latents come as the caller has them.
    assert all(came or layer.weight.shape[1] <= 4 for layer, came, _ in seen)


@pytest.mark.parametrize("name", ["unet", "vq", "kl"])
def test_copies_and_loaded_networks_lie_alike(name, tmp_path):
    network = NETWORKS[name]().eval()
    network.save_pretrained(tmp_path)
    assert all(value.is_contiguous() for value in load_file(tmp_path / f"{network.weights_stem}.safetensors").values())
    images = torch.rand(2, 3, 40, 40)
    expected = run(network, images)
    for same in (type(network).from_pretrained(tmp_path), copy.deepcopy(network), EMA(network).model):
        assert all(channels_innermost(p) for p in same.parameters() if p.ndim == 4)
        assert torch.equal(run(same, images), expected)


INNERMOST, OUTERMOST = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize(
    ("device", "version", "hip", "expected"),
    [
        ("cpu", "2.10.0", None, INNERMOST),
        ("cpu", "2.15.0", "7.2", INNERMOST),
        ("meta", "2.10.0", None, INNERMOST),
        ("cuda", "2.10.0+cu128", None, OUTERMOST),
        ("cuda:1", "2.14.1", None, OUTERMOST),
        ("cuda", "2.15.0", None, INNERMOST),
        ("cuda", "2.15.1+cu130", None, INNERMOST),
        ("cuda", "3.0.0", None, INNERMOST),
        ("cuda", "2.15.0+rocm7.2", "7.2.0", OUTERMOST),
        ("mps", "2.15.0", None, OUTERMOST),
        ("xpu", "2.15.0", None, OUTERMOST),
    ],
)
def test_the_format_of_a_device(monkeypatch, device, version, hip, expected):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
    monkeypatch.setattr(torch.version, "hip", hip)
    assert layout.memory_format(torch.device(device)) is expected


@pytest.fixture
def turn(monkeypatch):
    """Calls that make outermost, and innermost again, what the CPU wants."""
    return functools.partial(monkeypatch.setattr, layout, "memory_format")


def lies(network, expected):
    weights = [p for p in network.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert weights
    return all(p.is_contiguous(memory_format=expected) for p in weights)


MOVES = {
    "to cpu": lambda owner: owner.to("cpu"),
    "double": lambda owner: owner.double(),
    "to bfloat16": lambda owner: owner.to(torch.bfloat16),
    "to_empty": lambda owner: owner.to_empty(device="cpu"),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_follows_the_device_it_is_moved_to(name, move, turn):
    network = NETWORKS[name]()
    owner = nn.ModuleDict({"network": network})  # as a LightningModule moves its own
    run(network, torch.rand(2, 3, 40, 40)).sum().backward()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    parameters = list(network.parameters())
    turn(lambda device: OUTERMOST)
    MOVES[move](owner)
    assert lies(network, OUTERMOST)
    assert all(p is was for p, was in zip(network.parameters(), parameters, strict=True))  # which optimizers hold
    assert all(p.grad is None or p.grad.stride() == p.stride() for p in parameters)
    if move != "to_empty":
        assert all(torch.equal(value, before[key].to(value.dtype)) for key, value in network.state_dict().items())
    assert lies(EMA(network).model, OUTERMOST)
    turn(lambda device: INNERMOST)
    assert lies(copy.deepcopy(owner.float())["network"], INNERMOST)


def test_what_is_built_or_loaded_lies_as_its_device_wants(turn, tmp_path):
    NETWORKS["unet"]().save_pretrained(tmp_path)
    turn(lambda device: OUTERMOST)
    built, loaded = NETWORKS["unet"](), UNet2DModel.from_pretrained(tmp_path)
    assert lies(built, OUTERMOST)
    assert lies(loaded, OUTERMOST)
    turn(lambda device: INNERMOST if device.type == "cpu" else OUTERMOST)
    assert lies(UNet2DModel.from_pretrained(tmp_path), INNERMOST)
    assert lies(loaded.to("meta"), OUTERMOST)


@pytest.mark.parametrize("name", ["vq", "kl"])
def test_latents_are_turned_by_the_first_layer_that_sees_them(name, turn):
    """A 1x1 kernel lies in both orders at once; its strides say which is meant."""
    network = NETWORKS[name]()
    latents = torch.rand(2, network.embed_dim, 8, 8)
    assert latents.is_contiguous()
    assert channels_innermost(network.post_quant_conv(latents))
    turn(lambda device: OUTERMOST)
    assert network.to("cpu").post_quant_conv(latents).is_contiguous()


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_goes_on_bit_for_bit_in_another_layout(fused, turn):
    def steps(network, optimizer, numbers):
        for number in numbers:
            random = torch.Generator().manual_seed(number)
            for p in network.parameters():
                gradient = torch.randn(p.shape, generator=random)
                p.grad = torch.empty_like(p).copy_(gradient)  # it lies as its parameter, as autograd makes it
            optimizer.step()

    network = PatchDiscriminator(channels=4)
    optimizer = torch.optim.AdamW(network.parameters(), fused=fused)
    steps(network, optimizer, range(3))
    saved = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
    steps(network, optimizer, range(3, 6))

    turn(lambda device: OUTERMOST)
    other = PatchDiscriminator(channels=4)
    optimizer = torch.optim.AdamW(other.parameters(), fused=fused)
    optimizer.register_load_state_dict_post_hook(layout.follow_parameters)
    other.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert lies(other, OUTERMOST)
    for p in other.parameters():
        assert optimizer.state[p]["exp_avg"].stride() == optimizer.state[p]["exp_avg_sq"].stride() == p.stride()
    steps(other, optimizer, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), other.parameters(), strict=True))
