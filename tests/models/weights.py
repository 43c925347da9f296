"""Comparing networks by their weights: outputs of equal weights may differ in the last bit, by memory alignment."""

import torch


def assert_equal_weights(model, reference):
    """The same names with the same values, bit for bit."""
    actual, expected = model.state_dict(), reference.state_dict()
    assert actual.keys() == expected.keys()
    assert [key for key in actual if not torch.equal(actual[key], expected[key])] == []
