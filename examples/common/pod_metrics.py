"""The metrics of a run that may be ended, and resumed, at any step."""

import csv
import os
import warnings
from pathlib import Path
from typing import Any


class Metrics:
    """A CSV file, written to by process 0, that a restart continues."""

    FIELDS = ("step", "loss", "skipped")

    def __init__(self, path: Path, step: int):
        self.path = path
        self.rows: list[tuple[Any, ...]] = []  # not yet in the file
        kept = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [r for r in csv.reader(file) if len(r) == len(self.FIELDS)]
            kept = [row for row in rows[1:] if int(row[0]) <= step]
        with path.with_suffix(".new").open("w", newline="") as file:
            csv.writer(file).writerows([self.FIELDS, *kept])
        path.with_suffix(".new").replace(path)

    def write(self) -> None:
        """Appends all rows or, if the disk is full, none: they wait for the next."""
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerows(self.rows)
        except OSError as error:
            os.truncate(self.path, size)
            warnings.warn(f"{self.path} was not written: {error}", stacklevel=2)
        else:
            self.rows.clear()
