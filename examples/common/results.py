"""What stands beside results: the machine and the versions; and tables in Markdown."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax


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
