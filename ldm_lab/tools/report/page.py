"""Builds the report page: one self-contained HTML file that cannot load anything from elsewhere."""

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

    Names and content of runs are untrusted: they enter as JSON that cannot open or close a tag, the scripts insert them
    as text, and the page's content security policy allows only these scripts and no loading.

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
    """JSON that is safe in a `script` element: without tags, comments and character references."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(text: str) -> str:
    """Hash of a script or style for the content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
