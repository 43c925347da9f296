import random
import subprocess
import sys

import numpy as np
import pytest

from ldm_lab.data import avatars
from ldm_lab.data.avatars import AvatarImages, render
from ldm_lab.data.drawing import draw_avatar
from ldm_lab.data.drawn import DrawnImages, drawn_or_folder


def tiny(folder, split="train", **arguments):
    return AvatarImages(split, folder, **{"image_size": 16, "num_train": 3, "num_val": 2, **arguments})


def test_an_avatar_is_a_function_of_seed_and_index():
    first = draw_avatar(0, 5, 32)
    random.seed(1)
    state = random.getstate()
    assert np.array_equal(draw_avatar(0, 5, 32), first)
    assert random.getstate() == state
    assert not np.array_equal(draw_avatar(0, 6, 32), first)
    assert not np.array_equal(draw_avatar(1, 5, 32), first)


def test_drawing_neither_moves_the_global_generator_nor_imports_torch():
    program = (
        "import random, sys; random.seed(0); state = random.getstate(); import ldm_lab.data.drawing; "
        "assert random.getstate() == state; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_picture_is_the_one_of_this_revision():
    """Fails when drawing.py draws otherwise: then raise its REVISION, and write the new colours here."""
    blocks = draw_avatar(0, 0, 32).reshape(2, 16, 2, 16, 3).mean(axis=(1, 3)).reshape(4, 3)
    expected = [[230, 219, 187], [230, 220, 188], [212, 200, 175], [212, 201, 175]]
    assert abs(blocks - expected).max() < 2


def test_a_head_stands_in_the_middle_on_a_light_ground():
    pictures = np.stack([draw_avatar(0, index, 32) for index in range(16)]).astype(int)
    ground = pictures[:, 0, 0]
    assert (ground == ground[0]).all()
    assert ground.min() > 220
    figure = (abs(pictures - ground[0]).sum(-1) > 30).mean(0)  # (32, 32): how often a pixel is covered
    assert (figure[12:20, 12:20] > 0.9).all()  # faces
    assert (figure[-1, 8:24] == 1).all()  # shoulders, cut by the lower edge alone
    assert figure[0].max() < 0.2
    assert figure[:, [0, -1]].max() == 0
    assert pictures.std(0)[16, 16].min() > 15  # skins and hair differ


def test_any_number_of_processes_draws_the_same():
    alone = render(seed=0, count=5, size=16, processes=1)
    assert np.array_equal(render(seed=0, count=5, size=16, processes=3), alone)
    assert np.array_equal(alone[4], draw_avatar(0, 4, 16))


def test_splits_share_one_file_and_no_image(tmp_path):
    train, val = tiny(tmp_path), tiny(tmp_path, "val")
    train.prepare()
    assert [path.name for path in tmp_path.iterdir()] == [train.file.name] == [val.file.name]
    assert (len(train), len(val)) == (3, 2)
    assert np.array_equal(np.asarray(val.read(0)), draw_avatar(0, 3, 16))
    assert train.fingerprint() != val.fingerprint()
    assert train[2]["image"].shape == (3, 16, 16)
    with pytest.raises(IndexError):
        train.read(3)


def test_the_file_is_drawn_once_and_named_after_all_that_it_depends_on(tmp_path, monkeypatch):
    tiny(tmp_path).prepare()
    monkeypatch.setattr(avatars, "render", lambda *_, **__: pytest.fail("drawn again"))
    tiny(tmp_path).prepare()
    tiny(tmp_path, "val").read(0)
    others = [{"drawing_seed": 1}, {"image_size": 24}, {"num_train": 4}]
    assert len({tiny(tmp_path, **other).file for other in [{}, *others]}) == 4


def test_an_interrupted_drawing_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(avatars, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny(tmp_path).prepare()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: b"", lambda whole: b"other" * 99])
def test_a_damaged_file_is_drawn_again(tmp_path, damage):
    whole = tiny(tmp_path)
    whole.prepare()
    content = whole.file.read_bytes()
    whole.file.write_bytes(damage(content))
    tiny(tmp_path, "val").prepare()
    assert whole.file.read_bytes() == content


def test_a_process_that_dies_is_an_error_and_the_others_end(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(RuntimeError, match="avatar 0 could not be drawn"):
        render(seed=0, count=4, size=16, processes=2)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"^paths\.cache=.*file"):
        tiny(tmp_path / "file").prepare()


def test_drawn_images_are_a_function_of_seed_and_index():
    train = DrawnImages("train", [12, 20], num_train=6, num_val=2, drawing_seed=4)
    again = DrawnImages("train", [12, 20], num_train=6, num_val=2, drawing_seed=4)
    pictures = [train.read(index).tobytes() for index in range(6)]
    assert pictures == [again.read(index).tobytes() for index in reversed(range(6))][::-1]
    assert len(set(pictures)) == 6
    assert train[0]["image"].shape == (3, 12, 20)
    val = DrawnImages("val", [12, 20], num_train=6, num_val=2, drawing_seed=4)
    assert len(val) == 2
    assert not {val.read(index).tobytes() for index in range(2)} & set(pictures)
    assert DrawnImages("train", [12, 20], drawing_seed=5).read(0).tobytes() != pictures[0]


def test_a_folder_takes_the_place_of_the_drawn_images(tmp_path):
    assert isinstance(drawn_or_folder(None, "train", 8), DrawnImages)
    for name in "ab":
        drawn_or_folder(None, "train", 16).read(0).save(tmp_path / f"{name}.png")
    assert drawn_or_folder(tmp_path, "val", [8, 12])[0]["image"].shape == (3, 8, 12)
