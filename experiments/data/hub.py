"""Data sets of the Hugging Face hub, or of a folder that holds the same files."""

import datasets


def load(
    source: str, split: str, columns: set[str], revision: str | None = None
) -> datasets.Dataset:
    """Returns one split of a data set.

    Args:
      source: Its name on the hub, or the folder with its files.
      split: Name of the split.
      columns: What it must hold.
      revision: Branch on the hub, if not the main one.

    Raises:
      OSError: It cannot be loaded.
      ValueError: It lacks a column.
    """
    try:
        found = datasets.load_dataset(source, split=split, revision=revision)
    except Exception as error:  # of many kinds: no network, no such name, no files
        raise OSError(
            f"cannot load the split {split!r} of the data set {source!r}: {error} "
            f"Without a network, copy the data set's Parquet files to a folder, such "
            f"that their names begin with the split's, and give that with --data."
        ) from error
    if missing := columns - set(found.column_names):
        raise ValueError(
            f"the data set {source!r} must have the columns {sorted(columns)}, and "
            f"lacks {sorted(missing)}: it has {found.column_names}."
        )
    return found
