"""Writes what a benchmark measured, with all that is needed to measure it again."""

import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from examples.common.results import machine, table, versions

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("jax", "jaxlib", "optax", "flax", "libtpu", "jax-cuda13-plugin", "torch")


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
    module = f"benchmarks.{Path(sys.argv[0]).stem}"
    about = {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
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
