import pytest
import torch

from ldm_lab.models.outputs import DecoderOutput, UNet2DOutput


def test_values_by_name_and_by_position():
    sample, loss = torch.zeros(1), torch.ones(())
    output = DecoderOutput(sample, loss)
    assert output.sample is output[0] is output["sample"] is output.to_tuple()[0] is sample
    assert output[1] is output.commit_loss is loss
    assert output[:1] == (sample,)


def test_a_value_that_is_not_there_has_no_position():
    assert len(DecoderOutput(torch.zeros(1)).to_tuple()) == 1
    with pytest.raises(IndexError):
        UNet2DOutput(torch.zeros(1))[1]
    with pytest.raises(AttributeError):
        UNet2DOutput(torch.zeros(1))["latents"]
