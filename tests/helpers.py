"""What several tests share: where the recorded outputs of the originals lie, and how to compare with them."""

import os
from pathlib import Path

import torch

# Another set of the same form can be tried by pointing this variable at it.
GOLDEN = Path(os.environ.get("LDM_LAB_GOLDEN", Path(__file__).parent / "golden"))


def assert_close_relative(actual, reference, relative=1e-4):
    """Largest difference within `relative` of the reference's largest magnitude."""
    actual, reference = torch.as_tensor(actual), torch.as_tensor(reference)
    assert actual.shape == reference.shape, f"shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    difference = (actual.double() - reference.double()).abs().max().item()
    bound = relative * reference.double().abs().max().item()
    assert difference <= bound, f"differs by {difference:.3e}, allowed {bound:.3e}"


def contents(folder):
    """Every file below a folder by its relative path, with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Malicious:
    """Unpickling this creates `path`: whether the file is there tells whether code was run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
