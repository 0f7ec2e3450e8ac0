"""Checkpoints that no failure of a disk or of a process can take a run down with.

A thin layer over Orbax's ``CheckpointManager``, for any pytree of arrays. A save that
fails is a warning; a checkpoint that cannot be read is named in a warning, put aside,
and the one before it used; one of another model or optimizer is an error that says
what is missing.
"""

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

KEEP = 3  # newest checkpoints
FINISH = 300  # seconds that processes wait for each other's part of a checkpoint
CARRY_OVER = "pod_training.py's docstring has the lines that carry over what is there"


class Checkpoints:
    """Saves a run's state while it goes on, and finds the newest that can be read."""

    def __init__(self, folder: Path):
        # Orbax logs every failed save as several tracebacks; here it is one warning.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.folder = folder.absolute()
        if jax.process_index() == 0:
            for path in self.folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                warnings.warn(
                    f"the checkpoint {path} was not finished when a run ended. It is "
                    "deleted, and the one before it is used.",
                    stacklevel=2,
                )
        self._manager = self._open()
        self._saving: int | None = None  # the step whose save is under way

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEEP,
            cleanup_tmp_directories=True,  # of saves that were cut short
            async_options=ocp.options.AsyncOptions(timeout_secs=FINISH),
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def newest(self) -> int | None:
        """Returns the step of the newest checkpoint, if there is one."""
        return self._manager.latest_step()

    def preempted(self, step: int) -> bool:
        """Whether all processes are to save and end after this step."""
        return self._manager.reached_preemption(step)

    def save(self, step: int, state: Any) -> None:
        """Starts to save ``state``, once the last save is finished."""
        self.wait()
        self._saving = step
        problem = None
        try:
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except Exception as error:  # whatever it is, training matters more
            problem = error
        self._check(problem)

    def wait(self) -> None:
        """Waits until what was to be saved is on disk, or known not to be."""
        if self._saving is None:
            return
        problem = None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            problem = error
        self._check(problem)
        self._saving = None

    def _check(self, problem: Exception | None) -> None:
        """Warns of a failed save, and begins anew with whatever is on disk."""
        if self._saving is None or _everywhere(problem is None):
            return
        reason = problem or "another process failed to write its part"
        warnings.warn(
            f"the checkpoint of step {self._saving} was not saved: {_brief(reason)}. "
            f"Training goes on; the newest checkpoint in {self.folder} is older.",
            stacklevel=3,
        )
        self._saving = None
        with contextlib.suppress(Exception):  # the same failure again
            self._manager.close()
        self._manager = self._open()

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Returns the step and state of the newest checkpoint that can be read.

        Args:
          like: The state's tree, of arrays or of ``jax.ShapeDtypeStruct`` with their
            shardings, which may be others than those of the processes that saved.

        Returns:
          None if there is no checkpoint at all.

        Raises:
          ValueError: If a checkpoint is of another tree or of other shapes.
          OSError: If there are, or were, checkpoints and none can be read.
        """
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            state, problem = None, None
            try:
                state = self._read(step, like)
            except _MismatchError as error:
                raise ValueError(str(error)) from None
            except Exception as error:  # a damaged file fails in many ways
                problem = error
            if _everywhere(problem is None):
                return step, state
            reason = problem or "another process could not read its part"
            warnings.warn(
                f"the checkpoint {self.folder / str(step)} cannot be read: "
                f"{_brief(reason)}. It is renamed {step}.unreadable, and the one "
                "before it is used.",
                stacklevel=2,
            )
            if jax.process_index() == 0:
                aside = self.folder / f"{step}.unreadable"
                while aside.exists():
                    aside = aside.with_name(f"{aside.name}.too")
                (self.folder / str(step)).rename(aside)
            multihost_utils.sync_global_devices(f"put checkpoint {step} aside")
            self._manager.reload()
        # Also the next time, lest a run that has lost them begins anew unnoticed.
        if steps or any(self.folder.glob("*.unreadable")):
            raise OSError(
                f"no checkpoint in {self.folder} can be read. To start from the first "
                "step, give another folder with --output."
            )
        return None

    def _read(self, step: int, like: Any) -> Any:
        # Every process for itself, so that none waits for one that fails.
        process = jax.process_index()
        options = ocp.CheckpointManagerOptions(
            create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=process,
                active_processes={process},
                barrier_sync_key_prefix=f"process_{process}",
            ),
        )
        with ocp.CheckpointManager(
            self.folder,
            options=options,
            item_handlers=ocp.StandardCheckpointHandler(
                multiprocessing_options=options.multiprocessing_options
            ),
        ) as manager:
            metadata = manager.item_metadata(step)
            if not jax.tree.leaves(metadata):
                raise OSError("what it holds is not on record")
            _check_tree(self.folder / str(step), metadata, like)
            return manager.restore(step, args=ocp.args.StandardRestore(like))

    def close(self) -> None:
        """Waits for the last save, and gives the threads back."""
        self.wait()
        self._manager.close()


class _MismatchError(Exception):
    """The checkpoint is whole, but of another tree."""


def _check_tree(path: Path, saved: Any, like: Any) -> None:
    """Refuses a checkpoint of other arrays than those of ``like``."""
    has, needs = _shapes(saved), _shapes(like)
    lacks = sorted(needs.keys() - has.keys())
    more = sorted(has.keys() - needs.keys())
    if lacks or more:
        problems = []
        if lacks:
            problems.append(f"lacks {_trees(lacks, has)}")
        if more:
            problems.append(f"holds {_trees(more, needs)}, which is not wanted")
        hint = ""
        if any("bound" in name.split(".") for name in lacks):
            hint = f" It is not of AdaMod, whose third average is bound: {CARRY_OVER}."
        raise _MismatchError(f"the checkpoint {path} {' and '.join(problems)}.{hint}")
    for name, shape in needs.items():
        if shape != has[name]:
            raise _MismatchError(
                f"the checkpoint {path} has {name} of shape {has[name]}, but the "
                f"model's is of {shape}. Give the sizes it was trained with."
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _trees(names: list[str], others: dict[str, Any]) -> str:
    """The names of the largest subtrees that hold ``names`` and none of ``others``."""
    trees: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        tree = next(
            (
                prefix
                for prefix in prefixes
                if not any(f"{other}.".startswith(f"{prefix}.") for other in others)
            ),
            name,
        )
        trees[tree] = trees.get(tree, 0) + 1
    return ", ".join(f"{tree} ({count} arrays)" for tree, count in trees.items())


def _everywhere(fine: bool) -> bool:
    """Whether ``fine`` in all processes."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))


def _brief(problem: object) -> str:
    """The first line of an error, without TensorStore's description of the file."""
    text = str(problem).split(" [tensorstore_spec", 1)[0].strip().split("\n", 1)[0]
    name = type(problem).__name__
    return text if isinstance(problem, str) else f"{name}: {text.rstrip('.')}"
