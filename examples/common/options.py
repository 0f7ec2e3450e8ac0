"""What options may be, and what is said when they are not."""

from typing import Any


def check_counts(options: Any, *names: str) -> None:
    """Requires that the options of these names are at least 1."""
    for name in names:
        if (value := getattr(options, name)) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least 1, got {value}.")


def check_heads(options: Any, heads: int) -> None:
    """Requires that attention can share out the width among its heads."""
    if options.width % heads:
        raise ValueError(
            f"--width must be a multiple of {heads}, the number of heads, got "
            f"{options.width}."
        )


def check_rates(options: Any) -> None:
    """Requires learning rates, all positive."""
    if not options.rates or min(options.rates) <= 0:
        raise ValueError(f"--rates must be positive, got {options.rates}.")


def check_decays(options: Any, *names: str) -> None:
    """Requires decay rates of averages that average something."""
    for name in names:
        if not 0 < getattr(options, name) < 1:
            raise ValueError(
                f"--{name} must be in (0, 1), got {getattr(options, name)}."
            )
