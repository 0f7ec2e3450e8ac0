"""What makes an experiment a command."""

from collections.abc import Callable
from typing import Any

import matplotlib
import tyro


def command(main: Callable[[Any], Any], options: type, about: str | None) -> None:
    """Runs ``main`` with options from the command line; what is wrong is one line."""
    matplotlib.use("Agg")
    try:
        main(tyro.cli(options, description=about))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
