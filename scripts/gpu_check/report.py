"""What a check has found, as one JSON file and one Markdown table made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldm_lab.utils.writing import replacing

JSON, MARKDOWN = "gpu_check.json", "gpu_check.md"
MACHINE = "machine"  # the row whose notes say what was measured on; it stands above the table
COLUMNS = {"seconds": ",.1f", "images_per_s": ",.1f", "share_of_peak": ".1%", "mb_per_image": ",.0f", "ratio": ".2f"}
HEAD = ("what", "seconds", "images/s", "of matmul peak", "MB an image", "x diffusers", "more")


def write(result: dict[str, Any], folder: Path) -> None:
    """Write both files."""
    for name, text in ((JSON, json.dumps(result, indent=1) + "\n"), (MARKDOWN, markdown(result))):
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def passed(result: dict[str, Any]) -> bool:
    """Whether every part ran and passed, with all its rows."""
    rows = [row for part in result["parts"] for row in part["rows"]]
    return all(part["status"] == "passed" for part in result["parts"]) and not any("not_run" in row for row in rows)


def markdown(result: dict[str, Any]) -> str:
    """The machine in a line, the table, and the last lines of what failed."""
    rows = [row for part in result["parts"] for row in part["rows"]]
    machine = next((row.get("notes", {}) for row in rows if row["what"] == MACHINE), {})
    size = ", tiny networks: the numbers mean nothing" if result["small"] else ""
    about = ", ".join(f"{key} {shown(value)}" for key, value in machine.items())
    lines = [f"`scripts/gpu_check.sh --device {result['device']}`{size}; {result['seconds']:.0f} s. {about}.", ""]
    lines += [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    lines += [_line(row) for row in rows if row["what"] != MACHINE or "notes" not in row]
    failed = [part for part in result["parts"] if part["status"] == "failed"]
    for part in failed:
        lines += ["", f"**{part['name']} failed**: {part['reason']}", "", "```", *part["tail"], "```"]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    """A row of the table; `|` would end a cell."""
    cells = [format(row[key], form) if row.get(key) is not None else "" for key, form in COLUMNS.items()]
    more = [f"**{name.replace('_', ' ')}**: {row[name]}" for name in ("failed", "not_run") if name in row]
    more += [f"{key} {shown(value)}" for key, value in row.get("notes", {}).items()]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (row["what"], *cells, ", ".join(more))) + " |"


def shown(value: Any) -> str:  # noqa: ANN401
    """A note as it stands in the table."""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
