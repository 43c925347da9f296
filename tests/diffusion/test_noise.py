import pytest
import torch

from ldm_lab.diffusion.noise import randn, step_noise


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_equals_diffusers_bit_for_bit():
    torch_utils = pytest.importorskip("diffusers.utils.torch_utils")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        options = {"device": torch.device("cpu"), "dtype": dtype}
        for shape in ((1, 3, 4, 4), (3, 3, 8, 8)):
            ours, theirs = (
                randn(shape, generator(7), **options),
                torch_utils.randn_tensor(shape, generator(7), **options),
            )
            assert torch.equal(ours, theirs)
            each = [generator(i) for i in range(shape[0])], [generator(i) for i in range(shape[0])]
            assert torch.equal(randn(shape, each[0], **options), torch_utils.randn_tensor(shape, each[1], **options))


def test_each_sample_comes_from_its_own_generator_alone():
    together = randn((3, 2, 4), [generator(i) for i in (5, 6, 7)])
    assert torch.equal(together[1:2], randn((1, 2, 4), [generator(6)]))
    assert torch.equal(together[[2, 0]], randn((2, 2, 4), [generator(7), generator(5)]))


def test_without_a_generator_torch_decides():
    torch.manual_seed(3)
    noise = randn((2, 2))
    torch.manual_seed(3)
    assert torch.equal(noise, torch.randn(2, 2))


def test_wrong_number_of_generators():
    with pytest.raises(ValueError, match="generator: 2 given for a batch of 3"):
        randn((3, 1), [generator(0), generator(1)])
    with pytest.raises(ValueError, match="generator: 1 given for a batch of 3"):
        randn((3, 1), [generator(0)])
    with pytest.raises(ValueError, match="generator: 0 given"):
        randn((3, 1), [])


def test_step_noise_refuses_what_does_not_fit():
    sample = torch.zeros(2, 3)
    assert torch.equal(step_noise(sample, None, torch.ones(2, 3)), torch.ones(2, 3))
    with pytest.raises(ValueError, match="exclude each other"):
        step_noise(sample, generator(0), sample)
    with pytest.raises(ValueError, match=r"variance_noise has shape \(1, 3\)"):
        step_noise(sample, None, torch.ones(1, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cpu_generator_gives_the_same_noise_on_every_device():
    noise = randn((2, 3), generator(1), "cuda")
    assert noise.is_cuda
    assert torch.equal(noise.cpu(), randn((2, 3), generator(1)))
    own = torch.Generator("cuda").manual_seed(1)
    assert randn((2, 3), own, "cpu").device.type == "cpu"
