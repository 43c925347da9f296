"""The page: one HTML file with everything in it, which opens from disk and can load nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from string import Template

from ldm_lab.runs.record import RunRecord
from ldm_lab.tools.report.content import content
from ldm_lab.tools.report.pictures import Budget
from ldm_lab.utils.version import __version__

SCRIPTS = ("elements.js", "chart.js", "pictures.js", "page.js")


def page(runs: Sequence[RunRecord], budget: Budget) -> str:
    """HTML that shows the runs side by side.

    What runs are called and hold is untrusted: it enters as JSON in which no tag can begin or end, the scripts put it
    into the page as text, and the page's policy runs no other script than these and loads nothing.

    Raises:
        LoadError: a run has no metrics, or something in it cannot be read.
    """
    shown = content(runs, budget) | {"version": __version__}
    assets = files(__package__)
    style = assets.joinpath("page.css").read_text(encoding="utf-8")
    script = "\n".join(assets.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)};"
        " base-uri 'none'; form-action 'none'"
    )
    template = Template(assets.joinpath("page.html").read_text(encoding="utf-8"))
    title = html.escape(" and ".join(run["name"] for run in shown["runs"]))
    return template.substitute(title=title, policy=policy, style=style, script=script, content=as_json(shown))


def as_json(value: object) -> str:
    """JSON that may stand in a `script` element: nothing in it is a tag, a comment or a reference."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(text: str) -> str:
    """As a policy names what it lets run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
