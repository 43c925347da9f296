import pytest
import torch

from ldm_lab.losses.adversarial import AdversarialTerm, adaptive_weight, discriminator_hinge, generator_hinge


def test_hinge_stops_where_the_discriminator_is_sure():
    real, fake = torch.tensor([3.0, 0.0]), torch.tensor([-2.0, 0.5])
    assert discriminator_hinge(real, fake) == 0.5 * (0.5 + 0.75)
    assert generator_hinge(fake) == 0.75
    assert discriminator_hinge(torch.full((4,), 1.0), torch.full((4,), -1.0)) == 0


def test_losses_are_float32():
    logits = torch.randn(2, 1, 3, 3).bfloat16()
    assert generator_hinge(logits).dtype == discriminator_hinge(logits, logits).dtype == torch.float32


def test_adaptive_weight_is_the_ratio_of_the_gradients():
    last_layer = torch.tensor([3.0, 4.0], requires_grad=True)
    nll, generator = 2 * last_layer.square().sum(), (last_layer * torch.tensor([0.0, 5.0])).sum()
    weight = adaptive_weight(nll, generator, last_layer)
    assert weight.item() == pytest.approx(20 / (5 + 1e-4))  # |4 (3, 4)| over |(0, 5)|
    assert not weight.requires_grad
    assert last_layer.grad is None
    assert adaptive_weight(nll, generator, last_layer, max_weight=2.5) == 2.5


def test_adaptive_weight_without_gradients_is_zero():
    last_layer = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert adaptive_weight(last_layer.sum(), last_layer.sum(), last_layer) == 0


def test_start_is_counted_in_images():
    term = AdversarialTerm(start_images=100)
    assert [term.generator_factor(n) for n in (0, 99, 100, 1000)] == [0, 0, 1, 1]
    assert [term.discriminator_factor(n) for n in (0, 99, 100, 1000)] == [0, 0, 1, 1]


def test_ramp_lets_the_discriminator_learn_first():
    term = AdversarialTerm(start_images=100, ramp_images=50)
    assert [term.generator_factor(n) for n in (0, 100, 125, 150, 1000)] == [0, 0, 0.5, 1, 1]
    assert [term.discriminator_factor(n) for n in (99, 100)] == [0, 1]
