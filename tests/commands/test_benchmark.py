"""`python -m ldm_lab benchmark` on tiny networks: what it counts, compares and refuses."""

import json

import pytest
import torch
from torch import nn

from ldm_lab.benchmark.contest import Contestant, Timing, compare, measure, row
from ldm_lab.commands.benchmark import main

CPU = torch.device("cpu")
TINY = ["--experiment", "avatars", "debug=tiny", "--rounds", "2", "--batch-size", "2", "--device", "cpu"]


@pytest.mark.parametrize("kind", ["encode", "sample", "train"])
def test_both_sides_compute_the_same(tmp_path, kind, capsys):
    pytest.importorskip("diffusers")
    main([kind, *TINY, "--against", "diffusers", "--steps", "2", "--output", str(tmp_path / "b.json")])
    found = json.loads((tmp_path / "b.json").read_text())
    own, peer = found["rows"]
    assert own["gflops"] > 0
    assert len(own["seconds"]) == len(peer["seconds"]) == 2
    (ratio,) = found["ratios"].values()
    assert ratio["ratio"] == pytest.approx(peer["ms"] / own["ms"])
    if kind == "train":  # nothing comes out of it that is alike: the weights move
        assert own["overhead"] > 0
    else:
        assert ratio["relative"] < 1e-4
    assert "x as fast as diffusers" in capsys.readouterr().out


def test_operations_are_counted_two_to_a_multiply_add_and_attention_on_a_cpu_too():
    network, q = nn.Linear(8, 4, bias=False), torch.randn(1, 2, 16, 8)
    runs = [lambda: network(torch.ones(3, 8)).detach(), lambda: nn.functional.scaled_dot_product_attention(q, q, q)]
    linear, attention = measure([Contestant("", run) for run in runs], 1, CPU, compiled=False)
    assert (linear.flops, attention.flops) == (2 * 3 * 8 * 4, 2 * 2 * 2 * 16 * 16 * 8)


def test_ratios_are_of_medians_and_of_images():
    own = Timing(seconds=[1.0, 2.0, 9.0], output=torch.tensor([1.0, 2.0]))
    peer = Timing(seconds=[4.0, 6.0, 5.0], output=torch.tensor([1.5, 2.0]))
    found = compare(own, peer, own_images=2, peer_images=1)
    assert found["ratio"] == 5.0  # 2 s for two images against 5 s for one
    assert found["quartiles"] == pytest.approx([(6.0 + 10 / 9) / 2, 7.0])
    assert (found["largest_difference"], found["relative"]) == (0.5, 0.25)


def test_contestants_take_turns():
    order = []
    made = [Contestant(name, lambda name=name: order.append(name)) for name in "ab"]
    measure(made, 3, CPU, compiled=False)
    assert "".join(order) == "ab" + "ababab"  # the first of each is not timed


def test_overhead_is_what_forward_and_backward_did_not_take():
    timing = Timing(seconds=[1.1, 1.1], cpu_seconds=[1.0, 1.0])
    assert row(Contestant("", lambda: None, rest=[0.1, 0.1]), timing, 1.0)["overhead"] == pytest.approx(0.1)


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--batch-size", "0"], ["--output", "nowhere/b.json"]])
def test_impossible_flags_are_refused(flags):
    with pytest.raises(ValueError, match=flags[0]):
        main(["encode", *flags])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_skips_with_the_reason(capsys):
    main(["encode", "--device", "cuda"])
    assert capsys.readouterr().out.startswith("skipped: --device cuda")
