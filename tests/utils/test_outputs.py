"""What networks, schedulers and pipelines return, beside what their namesakes in diffusers do."""

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from ldm_lab.diffusion.process import SchedulerOutput
from ldm_lab.models.outputs import AutoencoderKLOutput, DecoderOutput, EncoderOutput, UNet2DOutput
from ldm_lab.pipeline import ImagePipelineOutput

KINDS = pytest.mark.parametrize(
    "kind", [SchedulerOutput, ImagePipelineOutput, UNet2DOutput, DecoderOutput, EncoderOutput, AutoencoderKLOutput]
)


def made(kind, count=None):
    fields = [field.name for field in dataclasses.fields(kind)][:count]
    return kind(**{name: torch.full((2,), float(place)) for place, name in enumerate(fields)}), fields


@KINDS
def test_values_by_name_number_and_attribute(kind):
    output, names = made(kind)
    assert list(output) == list(output.keys()) == names
    assert len(output) == len(names)
    assert isinstance(output, dict)
    for place, name in enumerate(names):
        value = getattr(output, name)
        assert value is output[name] is output[place] is output.to_tuple()[place] is output.get(name)
        assert value is list(output.values())[place] is dict(output.items())[name] is dict(**output)[name]
        assert name in output
    assert output[:1] == (output[0],)
    assert output[-1] is output[len(names) - 1]


@KINDS
def test_a_value_that_is_not_there_has_no_place(kind):
    output, names = made(kind, 1)
    assert list(output) == names[:1]
    assert len(output.to_tuple()) == 1
    with pytest.raises(IndexError):
        output[1]
    with pytest.raises(KeyError):
        output["nothing"]
    for field in dataclasses.fields(kind)[1:]:
        assert getattr(output, field.name) is None
        with pytest.raises(KeyError):
            output[field.name]


@KINDS
@pytest.mark.parametrize("count", [1, None])
def test_copies_and_pickles(kind, count):
    output, names = made(kind, count)
    for twin in (copy.copy(output), copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert type(twin) is kind
        assert list(twin) == names
        assert all(torch.equal(twin[name], output[name]) for name in names)
    changed = dataclasses.replace(output, **{names[0]: torch.ones(3)})
    assert torch.equal(changed[0], torch.ones(3))
    assert torch.equal(output[0], torch.zeros(2))


@KINDS
def test_tools_for_nested_values_go_through_it(kind):
    output, names = made(kind)
    leaves, structure = pytree.tree_flatten(output)
    assert [float(leaf[0]) for leaf in leaves] == list(range(len(names)))
    doubled = pytree.tree_map(lambda value: 2 * value, output)
    assert type(doubled) is kind
    assert torch.equal(doubled[-1], 2 * output[-1])
    assert type(pytree.tree_unflatten(leaves, structure)) is kind


def test_values_are_replaced_by_name_and_attribute_alike():
    output = DecoderOutput(torch.zeros(1), torch.ones(()))
    output.sample = torch.ones(1)
    assert output["sample"] is output.sample is output[0]
    output["sample"] = torch.zeros(2)
    assert output["sample"] is output.sample is output[0]
    for change in (lambda: output.pop("sample"), lambda: output.update(sample=1), lambda: output.setdefault("a", 1)):
        with pytest.raises(TypeError, match="values of a DecoderOutput"):
            change()
    with pytest.raises(TypeError):
        del output["sample"]


def test_their_ways_are_those_of_the_namesake():
    """Whatever public method its `BaseOutput` has of its own, ours has."""
    base = pytest.importorskip("diffusers").utils.BaseOutput
    theirs = {name for name, value in vars(base).items() if inspect.isfunction(value)}
    assert theirs - {"__post_init__"} <= set(dir(SchedulerOutput))
    pipelines = pytest.importorskip("diffusers").pipelines.pipeline_utils
    output, other = (kind(images=[1, 2]) for kind in (ImagePipelineOutput, pipelines.ImagePipelineOutput))
    for look in (
        list,
        dict,
        len,
        lambda it: it[0],
        lambda it: it["images"],
        lambda it: it.to_tuple(),
        lambda it: it[:1],
    ):
        assert look(output) == look(other)


def test_a_compiled_network_returns_it():
    @torch.compile(backend="eager", fullgraph=True)
    def network(x):
        return UNet2DOutput(2 * x)

    output = network(torch.ones(2))
    assert type(output) is UNet2DOutput
    assert torch.equal(output.sample, 2 * torch.ones(2))
    assert output["sample"] is output.sample is output[0]
