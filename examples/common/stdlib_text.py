"""Text that needs no download: the source of Python's own standard library."""

import sysconfig
from pathlib import Path

import numpy as np

FOLDER = Path(sysconfig.get_path("stdlib"))


def load_text(folder: Path, at_least: int, files: str = "*.py") -> np.ndarray:
    """Returns the bytes of the folder's files of a pattern, end to end: uint8[N]."""
    text = b"".join(path.read_bytes() for path in sorted(folder.glob(files)))
    if len(text) <= at_least:
        raise ValueError(
            f"the {Path(files).suffix} files in {folder} hold {len(text)} bytes; one "
            f"batch needs more than {at_least}. Give another folder with --text."
        )
    return np.frombuffer(text, np.uint8)
