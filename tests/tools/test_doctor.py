"""`python -m ldm_lab doctor`: what it says of a healthy run, of a broken one, and of what is no run."""

from pathlib import Path

import pytest

from ldm_lab.tools.doctor import main
from tests.tools.report.runs import write_stage

DEMO = Path(__file__).resolve().parents[1] / "runs/diagnosis/demo"


def test_a_healthy_demo_is_not_diagnosed(capsys):
    main([str(DEMO)])
    out = capsys.readouterr().out
    assert "BAD" not in out
    assert out.splitlines()[-1] == "0 bad, 2 to look at, 12 ok, 5 not logged"  # the speed: others used the machine
    assert f"{DEMO}/diffusion: 22,400 of 22,400 images, not finished" in out
    assert "0.0288, 0.13 times the 0.226 of predicting zero (healthy: at most 0.6)" in out


def test_what_is_bad_ends_with_status_1_and_says_what_to_change(tmp_path, capsys):
    stage = write_stage(tmp_path / "a/autoencoder", "autoencoder", {10_000: {"val/psnr": 20}, 20_000: {"val/psnr": 3}})
    with pytest.raises(SystemExit) as end:
        main([str(stage.parent)])
    assert end.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    place = next(place for place, line in enumerate(lines) if line.split()[:2] == ["BAD", "reconstructions"])
    assert "3.0 dB PSNR (healthy: at least 24)" in lines[place]
    assert "max_images" in lines[place + 1]
    assert lines[-1].startswith("1 bad, ")


def test_one_stage_may_be_asked_for(capsys):
    main([str(DEMO / "autoencoder")])
    assert "diffusion" not in capsys.readouterr().out.replace(str(DEMO), "").lower()


@pytest.mark.parametrize("metrics", [False, None])
def test_what_cannot_be_examined_is_one_line(tmp_path, metrics):
    folder = tmp_path / "a"
    if metrics is None:
        write_stage(folder / "diffusion")
    with pytest.raises(ValueError, match=r"no such folder|nothing was measured yet") as error:
        main([str(folder)])
    assert "\n" not in str(error.value)
