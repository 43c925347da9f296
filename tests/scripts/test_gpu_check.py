"""`scripts/gpu_check.sh` without a GPU: its parts in small form, what it says of parts that fail, and its time."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from scripts.gpu_check import __main__ as command
from scripts.gpu_check import measured, report
from scripts.gpu_check.parts import parts
from scripts.gpu_check.runner import Check, Part, run_all

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/gpu_check.sh"
FIGURES = ("seconds", "images_per_s", "share_of_peak", "ratio")


def good(check):
    yield {"what": "a", "images_per_s": 1234.5, "notes": {"device": check.device}}


def half(check):
    yield {"what": "b", "share_of_peak": 0.5}
    print("about to | fail")
    raise RuntimeError("injected")


def silent(check):
    yield from ()


def endless(check):
    yield {"what": "d", "seconds": 1.0}
    subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(3); open({str(check.out / 'alive')!r}, 'w')"])
    time.sleep(60)


def killed(check):
    os.kill(os.getpid(), 9)
    yield


def row_fails(check):
    yield {"what": "f", "failed": "CUDA error"}
    yield {"what": "g", "ratio": 2.0}


GOOD = Part("good", good, ("a",), 20)


@pytest.fixture
def check(tmp_path):
    """Runs parts; returns the result, which lies in both files too."""
    (tmp_path / "out/logs").mkdir(parents=True)
    (tmp_path / "work").mkdir()

    def run(*some, seconds=60.0, method="fork"):
        told = Check("cpu", True, tmp_path / "work", tmp_path / "out")
        result = run_all(some, told, seconds, multiprocessing.get_context(method))
        assert json.loads((tmp_path / "out" / report.JSON).read_text()) == result
        assert (tmp_path / "out" / report.MARKDOWN).read_text() == report.markdown(result)
        return result

    return run


def lines(result):
    """The rows of the table, by their name."""
    table = [line for line in report.markdown(result).splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in table[1:]}


def statuses(result):
    return {part["name"]: part["status"] for part in result["parts"]}


def test_a_part_that_fails_is_reported_and_the_others_run(check):
    result = check(GOOD, Part("half", half, ("b", "c"), 20), Part("silent", silent, ("s",), 20), GOOD)
    assert statuses(result) == {"good": "passed", "half": "failed", "silent": "failed"}
    assert len(result["parts"]) == 4
    failed = result["parts"][1]
    assert failed["rows"][0] == {"what": "b", "share_of_peak": 0.5}  # what it knew before is kept
    assert failed["reason"] == "RuntimeError: injected"
    assert "about to | fail" in failed["tail"]
    table = lines(result)
    assert "**failed**: RuntimeError: injected" in table["c"]
    assert "without this row" in table["s"]
    assert "| 50.0% |" in table["b"]
    assert "1,234.5" in table["a"]
    assert "**half failed**: RuntimeError: injected" in report.markdown(result)
    assert not report.passed(result)
    assert report.passed(check(GOOD))


def test_a_part_ends_at_its_limit_with_all_that_it_has_started(check, tmp_path):
    result = check(GOOD, Part("endless", endless, ("d", "e"), 1), GOOD)
    assert statuses(result) == {"good": "passed", "endless": "failed"}
    assert result["parts"][1]["seconds"] < 20
    assert "its time limit of 1 s was reached" in lines(result)["e"]
    assert "| d | 1.0 |" in lines(result)["d"]
    time.sleep(3)
    assert not (tmp_path / "out/alive").exists()


def test_a_process_that_is_killed_is_named(check):
    assert check(GOOD, Part("killed", killed, ("k",), 20))["parts"][1]["reason"] == "its process was ended by SIGKILL"


def test_what_does_not_fit_the_time_is_named(check):
    result = check(GOOD, Part("long", good, ("a", "later"), 300, least=200), GOOD, seconds=100)
    assert statuses(result) == {"good": "passed", "long": "not run"}
    assert "**not run**: no time left (" in lines(result)["later"]
    assert not report.passed(result)
    result = check(GOOD, GOOD, seconds=0.5)
    assert statuses(result) == {"good": "not run"}
    assert "no time left (0 s of 0.5 s)" in lines(result)["a"]


def test_nothing_is_measured_without_the_first_part(check):
    result = check(Part("machine", half, ("b",), 20), GOOD)
    assert statuses(result) == {"machine": "failed", "good": "not run"}
    assert "**not run**: machine failed" in lines(result)["a"]


def test_a_row_that_failed_fails_its_part(check):
    result = check(Part("benchmark", row_fails, ("f", "g"), 20))
    assert statuses(result) == {"benchmark": "failed"}
    assert "**failed**: CUDA error" in lines(result)["f"]
    assert "| 2.00 |" in lines(result)["g"]


class Loss(torch.nn.Module):
    """With a gradient inside, of a layer that it is given: as the discriminator's adaptive weight is computed."""

    def forward(self, output, weight):
        loss = output.square().sum()
        torch.autograd.grad(loss, weight, retain_graph=True)
        return loss


def test_operations_are_counted_through_a_gradient_within_a_step():
    network, loss = torch.nn.Linear(8, 4, bias=False), Loss()
    x, q = torch.randn(3, 8), torch.randn(1, 2, 16, 8)
    product = 2 * 3 * 8 * 4
    assert measured.operations(lambda: loss(network(x), network.weight).backward()) == 3 * product
    with (
        pytest.raises(RuntimeError, match="leaf node"),
        FlopCounterMode(display=False),
    ):  # where it no longer does, use it
        loss(network(x), network.weight)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert measured.operations(lambda: attention(q, q, q)) == 2 * 2 * 2 * 16 * 16 * 8


@pytest.mark.slow
def test_processes_may_start_anew_as_they_do_for_cuda(check):
    result = check(Part("machine", parts(small=True)[0].run, ("machine",), 60), seconds=300, method="spawn")
    assert statuses(result) == {"machine": "passed"}


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("scripts.gpu_check.__main__.multiprocessing.get_context", lambda _: multiprocessing)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["--out", str(tmp_path), "--seconds", "100"]) == 1
    out = capsys.readouterr().out
    assert "--device cuda: there is no GPU that this torch can use; --device cpu --small tries the parts" in out
    assert "| tests marked gpu |" in out


def test_wrong_flags_end_in_one_line(tmp_path):
    (tmp_path / report.JSON).write_text("{}")
    with pytest.raises(ValueError, match="holds the result of an earlier check: name another folder"):
        command.main(["--out", str(tmp_path)])
    with pytest.raises(ValueError, match="--seconds 0: must be more than 0"):
        command.main(["--out", str(tmp_path / "new"), "--seconds", "0"])
    assert not (tmp_path / "new").exists()


@pytest.mark.soak
def test_all_parts_in_small_form(tmp_path):
    """Every part gives its figures; JSON and Markdown agree; nothing but the folder is written."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    flags = ["--device", "cpu", "--small", "--out", "result", "--seconds", "1800"]
    done = subprocess.run(
        [SCRIPT, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1900, check=False
    )
    out = tmp_path / "result"
    assert done.returncode == 0, done.stdout + done.stderr
    result, text = json.loads((out / report.JSON).read_text()), (out / report.MARKDOWN).read_text()
    assert text == report.markdown(result)
    assert text in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert {path.name for path in out.iterdir()} == {"logs", "samples.png", report.JSON, report.MARKDOWN}
    assert Image.open(out / "samples.png").size > (32, 32)
    table = lines(result)
    for part, found in zip(parts(small=True), result["parts"], strict=True):
        assert (found["name"], found["status"]) == (part.name, "passed")
        rows = {row["what"]: row for row in found["rows"]}
        assert set(part.rows) <= set(rows)
        for what, row in rows.items():
            numbers = {key: row[key] for key in FIGURES if row.get(key) is not None}
            assert all(value > 0 for value in numbers.values())
            assert numbers or row["notes"]
            for key, value in numbers.items() if what != report.MACHINE else ():
                assert f" {value:{report.COLUMNS[key]}} " in table[what]
    notes = {row["what"]: row["notes"] for part in result["parts"] for row in part["rows"]}
    assert notes["machine"]["torch"] in text.splitlines()[0]
    assert notes["tests marked gpu"]["failed"] == 0
    assert sum(notes["tests marked gpu"].values()) >= 5
    assert notes["demo, stage 1"]["val/psnr"] > 0
    assert notes["steps, stage 1 `paper`"]["discriminator"] == "yes"
    assert notes["data.batch_size=auto"]["found"] == 8
    assert "data.batch_size=64 is too much for the device: use 32, or auto" in notes["out of memory"]["message"]
