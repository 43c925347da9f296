"""`python -m ldm_lab report`: what it writes, and what it refuses in one line."""

import pytest

from ldm_lab.tools.report.command import main
from tests.tools.report.runs import write_picture, write_run, write_stage


def test_it_writes_one_file_and_says_its_size(tmp_path, capsys):
    one, other = write_run(tmp_path / "a"), write_run(tmp_path / "b", loss=(0.4, 0.1))
    before = sorted(tmp_path.rglob("*"))
    main([str(one), str(other), "--output", str(tmp_path / "r.html")])
    assert sorted(set(tmp_path.rglob("*")) - set(before)) == [tmp_path / "r.html"]
    assert capsys.readouterr().out == f"{tmp_path}/r.html: 2 run(s), 0.0 MB; open it in a browser\n"
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


def test_a_stage_is_enough(tmp_path):
    main([str(write_run(tmp_path / "a") / "diffusion"), "--output", str(tmp_path / "r.html")])


def test_pictures_are_bounded_by_flags(tmp_path):
    stage = write_run(tmp_path / "a") / "diffusion"
    for images in range(1, 30):
        write_picture(stage, "samples", images, size=(40, 40))
    for flags, count in ((["--pictures", "5"], 5), (["--pictures", "0"], 0), ([], 12)):
        file = tmp_path / f"{count}.html"
        main([str(tmp_path / "a"), "--output", str(file), *flags])
        assert file.read_text().count("data:image/") == count


def refused(tmp_path, *arguments):
    with pytest.raises(ValueError) as error:
        main([*map(str, arguments), "--output", str(tmp_path / "r.html")])
    assert not (tmp_path / "r.html").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    run = write_run(tmp_path / "a")
    assert "no run" in refused(tmp_path, run, tmp_path / "empty")
    assert "no such folder" in refused(tmp_path, run, tmp_path / "nowhere")
    assert "named twice" in refused(tmp_path, run, tmp_path / "." / "a")


def test_runs_without_metrics_are_refused(tmp_path):
    write_stage(tmp_path / "a/diffusion")
    assert "nothing was measured yet" in refused(tmp_path, tmp_path / "a")


@pytest.mark.parametrize(("name", "content"), [("metrics.csv", "a,b\n1,2\n"), ("data.npz", "x"), ("status.json", "[")])
def test_damaged_files_are_named(tmp_path, name, content):
    run = write_run(tmp_path / "a")
    (run / "diffusion" / name).write_text(content)
    assert name in refused(tmp_path, run, write_run(tmp_path / "b"))


def test_a_damaged_picture_is_named(tmp_path):
    run = write_run(tmp_path / "a")
    write_picture(run / "diffusion", "samples", 1).write_bytes(b"\x89PNG no")
    assert "samples_000000001.png" in refused(tmp_path, run)


def test_nothing_is_overwritten(tmp_path):
    run = write_run(tmp_path / "a")
    (tmp_path / "r.html").write_text("mine")
    with pytest.raises(ValueError, match="must be a new file"):
        main([str(run), "--output", str(tmp_path / "r.html")])
    assert (tmp_path / "r.html").read_text() == "mine"
    with pytest.raises(ValueError, match="in a folder that is there"):
        main([str(run), "--output", str(tmp_path / "no/r.html")])


@pytest.mark.parametrize("flag", ["--pictures=-1", "--width=1", "--quality=101"])
def test_flags_out_of_range_are_named(tmp_path, flag):
    with pytest.raises(ValueError, match=flag.split("=")[0]):
        main([str(write_run(tmp_path / "a")), flag, "--output", str(tmp_path / "r.html")])
