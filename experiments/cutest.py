"""Which share of CUTEst's small unconstrained problems does each contestant solve?

The problems are sif2jax's; gradients are exact and learning rates constant. A problem
is solved by a contestant that comes as far down from the start as the best of all, but
for a share (Moré and Wild's test):

    python -m experiments.cutest

A run that was stopped goes on.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

from examples.common.results import table, versions
from experiments.common.command import command
from experiments.common.contestants import (
    CONTESTANTS,
    Creates,
    Schedule,
    at_rate,
    create,
)
from experiments.common.report import command_and_date, environment
from experiments.common.report import write_csv as write_rows
from experiments.common.training import check_settings

B2 = 0.999
NAMES = tuple(name for name, x in CONTESTANTS.items() if not (x.at_jumps or x.tuned))
RATES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
STEPS = 1600  # on each problem
KEPT = 40  # budgets of which the lowest value so far is kept, evenly spaced
VARIABLES = 20  # of a problem, at most
TOLERANCE = 1e-3  # the share of the best descent that may be missing

Lowest = Mapping[str, Mapping[str, Sequence[float]]]  # by contestant and rate, of one


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares optimizers on CUTEst's problems."""

    problems: tuple[str, ...] = ()
    """Names of problems, by default all of up to 20 variables."""
    output: Path = Path("outputs/cutest")
    """Folder for the results; a run that was stopped goes on."""


def chosen(options: Options) -> list[Any]:
    """Returns the problems, the smallest first."""
    import sif2jax  # which takes a minute, for its large problems

    known = sif2jax.unconstrained_minimisation_problems
    if unknown := set(options.problems) - {x.name for x in known}:
        raise ValueError(f"--problems: {unknown} unknown to sif2jax.")
    small = [
        x
        for x in known
        if x.num_variables() <= VARIABLES
        and (not options.problems or x.name in options.problems)
    ]
    return sorted(small, key=lambda x: (x.num_variables(), x.name))


def objective_of(problem: Any) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """Returns the objective of a vector, and where it starts."""
    start, unravel = ravel_pytree(problem.y0)
    args = problem.args
    return lambda x: jnp.sum(problem.objective(unravel(x), args)), start


def lowest(
    objective: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    creates: Sequence[Creates],
    rates: Sequence[float],
    steps: int,
) -> np.ndarray:
    """Returns the lowest value so far before every step: [optimizers, rates, steps].

    A value that is no number counts for nothing. All optimizers share one program, of
    which the objective is by far the most to compile.
    """
    updates_of = [jax.vmap(at_rate(x, 0.0).update) for x in creates]

    def step(carry: Any, _: Any) -> Any:
        x, states, least = carry
        values, gradients = jax.vmap(jax.vmap(jax.value_and_grad(objective)))(x)
        least = jnp.fmin(least, values)
        both = [
            update(*each)
            for update, *each in zip(updates_of, gradients, states, x, strict=True)
        ]
        moves: list[Any] = [updates for updates, _ in both]
        x = optax.apply_updates(x, jnp.stack(moves))
        return (x, [state for _, state in both], least), least

    def run(states: Any) -> jax.Array:
        shape = len(creates), len(rates)
        x = jnp.broadcast_to(start, (*shape, *start.shape))
        carry = (x, states, jnp.full(shape, jnp.inf, start.dtype))
        return jax.lax.scan(step, carry, length=steps)[1]

    states = [[at_rate(x, rate).init(start) for rate in rates] for x in creates]
    stacked = [jax.tree.map(lambda *x: jnp.stack(x), *of_one) for of_one in states]
    return np.moveaxis(np.asarray(jax.jit(run)(stacked)), 0, -1)


def solve(problem: Any, path: Path) -> None:
    """Adds to the file of a problem what contestants are missing in it."""
    found = json.loads(path.read_text()) if path.exists() else {}
    missing = [name for name in NAMES if name not in found]
    if not missing:
        return
    objective, start = objective_of(problem)
    creates = [create(CONTESTANTS[name], Schedule(B2)) for name in missing]
    every = STEPS // KEPT
    values = lowest(objective, start, creates, RATES, STEPS)
    kept = np.concatenate([values[..., :1], values[..., every - 1 :: every]], axis=-1)
    for name, of_one in zip(missing, kept.tolist(), strict=True):
        found[name] = {
            f"{rate:g}": [x if math.isfinite(x) else None for x in row]
            for rate, row in zip(RATES, of_one, strict=True)
        }
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps(found))
    whole.replace(path)


def solved(found: Sequence[Lowest]) -> dict[str, np.ndarray]:
    """Returns by contestant which problems it has solved: bool[problems, rates, kept].

    The first of those kept is the start, from which nobody has come down yet.
    """
    by_problem: dict[str, list[np.ndarray]] = {}
    for one in found:
        values = {
            name: np.array([*by_rate.values()], float) for name, by_rate in one.items()
        }
        start = next(iter(values.values()))[0, 0]
        best = min(np.nanmin(x) for x in values.values())
        for name, x in values.items():
            done = start - x >= (1 - TOLERANCE) * (start - best)
            by_problem.setdefault(name, []).append(done)
    return {name: np.stack(x) for name, x in by_problem.items()}


def shares_table(solved_by: Mapping[str, np.ndarray]) -> str:
    """Returns the share solved in the end, at one rate for all or at any."""
    rows = []
    for name, done in solved_by.items():
        shares = done[:, :, -1].mean(axis=0)
        best = int(shares.argmax())
        rows.append(
            {
                "optimizer": name,
                "best lr for all": f"{RATES[best]:g}",
                "solved at it, percent": f"{100 * shares[best]:.1f}",
                "at any lr, percent": f"{100 * done[:, :, -1].any(axis=1).mean():.1f}",
            }
        )
    rows.sort(key=lambda row: -float(row["solved at it, percent"]))
    return table(rows)


def write_csv(
    solved_by: Mapping[str, np.ndarray], problems: Sequence[str], path: Path
) -> None:
    """Writes after how many gradients each had solved a problem, empty if never."""
    budgets = np.linspace(0, STEPS, KEPT + 1).round().astype(int)
    write_rows(
        (
            {"problem": problem, "optimizer": name}
            | {
                f"lr {rate:g}": budgets[row.argmax()] if row.any() else ""
                for rate, row in zip(RATES, done[index], strict=True)
            }
            for index, problem in enumerate(problems)
            for name, done in solved_by.items()
        ),
        path,
    )


def main(options: Options) -> dict[str, np.ndarray]:
    folder = options.output / "problems"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"rates": RATES, "steps": STEPS}
    check_settings(folder / "settings.json", settings | versions(("sif2jax",)))
    with jax.enable_x64(True):  # CUTEst's own precision
        problems = chosen(options)
        with tqdm(problems, unit="problem") as progress:
            for problem in progress:
                progress.set_description(problem.name)
                solve(problem, folder / f"{problem.name}.json")
                jax.clear_caches()  # no program is of use to another problem
    found = []
    for problem in problems:
        one = json.loads((folder / f"{problem.name}.json").read_text())
        found.append({name: one[name] for name in NAMES})
    solved_by = solved(found)
    text = (
        f"# cutest\n\n{command_and_date('cutest')}; {environment('sif2jax')}.\n\n"
        f"{len(problems)} problems of up to {VARIABLES} variables, "
        f"{STEPS:,} steps, tolerance {TOLERANCE:g}:\n\n{shares_table(solved_by)}\n"
    )
    (options.output / "cutest.md").write_text(text)
    names = [problem.name for problem in problems]
    write_csv(solved_by, names, options.output / "cutest.csv")
    print(text)
    return solved_by


if __name__ == "__main__":
    command(main, Options, __doc__)
