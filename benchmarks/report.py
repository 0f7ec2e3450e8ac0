"""Writes what a benchmark measured, with all that is needed to measure it again."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "optax", "flax", "libtpu", "jax-cuda13-plugin", "torch")


def machine() -> str:
    """Returns processor, cores and accelerator."""
    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [x for x in cpuinfo.read_text().splitlines() if "model name" in x]
        processor = names[0].split(":")[1].strip() if names else processor
    text = f"{processor}, {os.cpu_count()} cores"
    if jax.default_backend() != "cpu":
        text += f"; {jax.device_count()} x {jax.devices()[0].device_kind}"
    return text


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Returns the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table with a column for each key of the first row."""
    lines = [list(rows[0])]
    lines += [[_text(value) for value in row.values()] for row in rows]
    lines.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def save(
    name: str,
    tables: dict[str, list[dict[str, Any]]],
    folder: Path = RESULTS,
    packages: tuple[str, ...] = PACKAGES,
    notes: tuple[str, ...] = (),
) -> str:
    """Writes the tables to ``name.json`` and ``name.md``, and returns them as text.

    Args:
      name: Name of the files.
      tables: Rows of each table by its title; the rows of a table share their keys.
      folder: Where the files go.
      packages: Those whose versions matter.
      notes: Sentences that stand above the tables.

    Returns:
      What to print.
    """
    script = Path(sys.argv[0])
    about = {
        "command": " ".join(["python", f"benchmarks/{script.name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(packages),
        "notes": notes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(
        json.dumps(about | {"tables": tables}, indent=1) + "\n"
    )
    used = ", ".join(f"{key} {value}" for key, value in about["versions"].items())
    text = f"`{about['command']}`, {about['date']}; {about['machine']}; {used}.\n"
    text += "".join(f"\n{note}\n" for note in notes)
    for title, rows in tables.items():
        text += f"\n## {title}\n\n{table(rows)}\n"
    (folder / f"{name}.md").write_text(f"# {name}\n\n{text}")
    return f"\n{text}\nwritten: {folder / name}.json and .md"
