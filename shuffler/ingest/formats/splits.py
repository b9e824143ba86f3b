"""Which split a file or a folder belongs to, by its name."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import Final

WORDS: Final = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "t10k": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
}
"""Words that sources use for splits, in lower case, and our names for them."""

_BESIDE: Final = ("set", "data", "dataset", "split", "images", "imgs", "folder")
"""Words that folders of splits have beside the split's own."""

COLUMNS: Final = ("split", "set", "subset", "partition", "data set", "data_set", "dataset", "fold")
"""Names of columns that may say which split a row is of, in lower case."""

_SAY_NOTHING: Final = ("data", "dataset", "part", "shard", "file", "images")
"""Names of files that name no split."""

_NUMBERED: Final = re.compile(r"(?P<split>.+)-\d+-of-\d+(-[0-9a-f]+)?")


def of_folder(name: str) -> str | None:
    """Return the split that a folder's name means, None if it means none.

    `train`, `Train Data` and `val_set` do; `train station` does not.
    """
    words = [word.lower() for word in re.split(r"[^A-Za-z0-9]+", name) if word]
    meant = [WORDS[word] for word in words if word in WORDS]
    others = [word for word in words if word not in WORDS and word not in _BESIDE]
    return meant[0] if len(meant) == 1 and not others else None


def of_file(path: str) -> str | None:
    """Return the split that a file's path within the source means, None if it means none.

    The file's own name counts first, such as `train-00000-of-00002.parquet` or `cifar_test.tar`;
    then its folders', the innermost first; then any name before `-00000-of-00002`.
    """
    *folders, name = path.split("/")
    stem = name.partition(".")[0]
    for word in re.split(r"[^A-Za-z0-9]+", stem):
        if word.lower() in WORDS:
            return WORDS[word.lower()]
    split = next(filter(None, (of_folder(folder) for folder in reversed(folders))), None)
    numbered = _NUMBERED.fullmatch(stem)
    if split is None and numbered and numbered["split"] not in _SAY_NOTHING:
        return numbered["split"]
    return split


def by_pattern(path: str, patterns: Sequence[tuple[str, str]]) -> str | None:
    """Return the split of the first pattern that fits a path or a file's name; None if none does.

    `*` stands for anything, a slash included.
    """
    name = path.rpartition("/")[2]
    fits = (s for s, p in patterns if fnmatch.fnmatchcase(path, p) or fnmatch.fnmatchcase(name, p))
    return next(fits, None)
