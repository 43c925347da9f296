"""docs/quickstart.ipynb: a newcomer's path from images to samples, run from top to bottom with tiny networks."""

import base64
import io
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs/quickstart.ipynb"
SIZE = 32
# The tag of the cell of settings. Papermill knows it too: the cell below may replace them.
PARAMETERS = "parameters"


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell):
    """The images that a cell shows."""
    data = [output["data"]["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(png))) for png in data]


def settings(notebook):
    """Where the cell of settings is, and what it sets."""
    (place,) = (place for place, cell in enumerate(notebook.cells) if PARAMETERS in cell.metadata.get("tags", ()))
    known = {}
    exec(notebook.cells[place].source, known)
    return place, known


def with_settings(notebook, **values):
    """The notebook with a cell below its settings that replaces some of them; each must be one of its settings."""
    place, known = settings(notebook)
    assert set(values) <= set(known)
    assert all(type(known[name]) is type(value) for name, value in values.items())
    written = {
        name: f"Path({str(value)!r})" if isinstance(value, Path) else repr(value) for name, value in values.items()
    }
    source = "\n".join(f"{name} = {value}" for name, value in written.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
    return notebook


def test_it_is_committed_without_outputs():
    notebook = read()
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert not cell.outputs, f"cell {cell.id} has outputs: clear them before you commit"
        assert cell.execution_count is None, f"cell {cell.id} was run: clear its outputs before you commit"


def test_nothing_is_set_for_tests():
    """A newcomer trains real networks."""
    _, known = settings(read())
    assert known["EXTRA"] == []
    assert all(not path.is_absolute() for path in known.values() if isinstance(path, Path))


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    for name, folder in (("LDM_LAB_CACHE", "cache"), ("IPYTHONDIR", "ipython"), ("JUPYTER_RUNTIME_DIR", "runtime")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("WANDB_MODE", "offline")
    images, runs, output = tmp_path / "my images", tmp_path / "runs", tmp_path / "output"
    notebook = with_settings(
        read(),
        IMAGES=images,
        IMAGE_SIZE=SIZE,
        MAX_IMAGES="16",
        RUNS=runs,
        OUTPUT=output,
        STEPS=2,
        NUM_FACES=40,
        EXTRA=["debug=tiny", "logger=csv"],
    )
    # Jupyter starts a notebook in the folder where it lies.
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()

    assert len(list(images.iterdir())) == 40
    assert all((runs / "quickstart" / name).is_file() for name in ("samples.png", "model_index.json"))
    # The second run takes the autoencoder of the first.
    assert not (runs / "quickstart-lr/autoencoder").exists()
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "quickstart-lr" in page

    cells = {cell.get("id"): cell for cell in notebook.cells}
    assert len(pictures(cells["trained"])) == 1
    assert "iframe" in cells["report"].outputs[-1]["data"]["text/html"]
    shown = pictures(cells["pipeline"])
    assert [image.size for image in shown] == [(SIZE, SIZE)] * 4
    names = [f"sample_{index}.png" for index in range(4)]
    listed = code_cells(notebook)[-1].outputs[-1]["data"]["text/plain"]
    assert all(name in listed for name in ("pipeline", "report.html", *names))
    saved = [Image.open(output / name) for name in names]
    assert [image.size for image in saved] == [(SIZE, SIZE)] * 4
    assert len({image.tobytes() for image in saved}) == 4, "one image four times"
    assert [image.tobytes() for image in saved] == [image.convert("RGB").tobytes() for image in shown]
    assert (output / "pipeline/model_index.json").is_file()
