"""What is known of a device's memory."""

import sys

import pytest
import torch

from ldm_lab.training.planning import memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say")


@linux
def test_the_peak_is_of_what_was_in_use_since_it_was_reset():
    memory.reset_peak(CPU)
    before = memory.peak(CPU)
    block = torch.ones(2**27, dtype=torch.uint8)
    assert before + 0.9 * 2**27 < memory.peak(CPU) < before + 1.5 * 2**27
    del block
    assert memory.peak(CPU) > before + 0.9 * 2**27
    memory.reset_peak(CPU)
    assert memory.peak(CPU) < before + 0.5 * 2**27


@linux
def test_a_cpu_may_use_most_of_what_is_free():
    assert 0 < memory.free(CPU) <= memory.total(CPU)
    assert memory.budget(CPU) == pytest.approx(0.8 * memory.free(CPU), rel=0.1)


def test_a_gpu_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    assert (memory.free(GPU), memory.total(GPU), memory.peak(GPU)) == (20 * 2**30, 24 * 2**30, 7)
    assert memory.budget(GPU) == 18 * 2**30


def test_a_container_may_have_less_than_the_machine(tmp_path, monkeypatch):
    assert memory.group_limit(tmp_path) > 2**60
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.group_limit(tmp_path) > 2**60
    for name, text in {"max": "1000", "current": "700", "stat": "anon 1\ninactive_file 200\nfile 3"}.items():
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    assert memory.group_limit(tmp_path) == 500
    monkeypatch.setattr(memory, "group_limit", lambda: 500)
    assert memory.free(CPU) == 500


def test_out_of_memory_is_recognised_on_any_device():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.is_out_of_memory(error.value)
    for other in (torch.OutOfMemoryError("CUDA out of memory."), MemoryError()):
        assert memory.is_out_of_memory(other)
    for other in (RuntimeError("shapes differ"), ValueError("you tried to allocate")):
        assert not memory.is_out_of_memory(other)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (19.2 * 2**30, "19.2 GB"),
        (1234 * 2**30, "1,234 GB"),
        (2**30 - 1, "1,024 MB"),
        (2**21, "2 MB"),
        (1536, "1.5 kB"),
        (5, "5 B"),
    ],
)
def test_bytes_are_written_with_their_unit(size, text):
    assert memory.readable(size) == text
