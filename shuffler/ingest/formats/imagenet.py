"""The lists beside ImageNet's images: its classes, and what is on each validation image.

Images of training lie in a folder for each class; those of validation may lie all in one, with a
file that says what they show. Text in, names and labels out: which files there are is `folders`'.

A class list has a class a line, in the order of their labels: the folder's name, and perhaps words
for it (`n01440764 tench, Tinca tinca`), as in `synset_words.txt` and `LOC_synset_mapping.txt`.

A ground truth is one of

    490                                       ILSVRC2012_validation_ground_truth.txt: by the images'
                                              names in order, the number of the class from 1
    ILSVRC2012_val_00000001.JPEG 65           val.txt: a class's number from 0, or its folder
    ILSVRC2012_val_00000001,n01751748 1 2...  LOC_val_solution.csv, with a heading
    val_0.JPEG n03444034 0 32 44 62           val_annotations.txt of Tiny ImageNet
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from downpour.shuffler.errors import IngestError

CLASS_LISTS: Final = ("classes.txt", "synset_words.txt", "LOC_synset_mapping.txt", "synsets.txt")
"""Names by which a class list is found where none is given."""

GROUND_TRUTHS: Final = (
    "ILSVRC2012_validation_ground_truth.txt",
    "LOC_val_solution.csv",
    "val.txt",
    "val_annotations.txt",
)
"""Names by which a ground truth is found where none is given."""


def parse_class_list(
    text: str, where: str, folders_there: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Return the classes' folders and their names, both by label.

    A class without words is named like its folder. A folder's name ends at the first blank, unless
    there is a folder whose name has blanks (`golden retriever`): the longest one that fits counts.

    Raises:
        IngestError: the list is empty, or has a folder twice.
    """
    folders, names = [], []
    for line in text.splitlines():
        folder, words = _split_line(line.strip(), folders_there)
        if folder:
            folders.append(folder)
            names.append(words.strip() or folder)
    if not folders:
        raise IngestError(f"{where} lists no classes; give a line for each: folder and name")
    twice = (
        sorted({folder for folder in folders if folders.count(folder) > 1})
        if (len(set(folders)) < len(folders))
        else []
    )
    if twice:
        raise IngestError(f"{where} lists {twice[0]} twice; remove one of the lines")
    return folders, names


def _split_line(line: str, folders: Collection[str]) -> tuple[str, str]:
    if line in folders:
        return line, ""
    blanks = [at for at, letter in enumerate(line) if letter.isspace()]
    for at in reversed(blanks):
        if line[:at] in folders:
            return line[:at], line[at:]
    return (line[: blanks[0]], line[blanks[0] :]) if blanks else (line, "")


def parse_ground_truth(
    text: str, images: Sequence[str], folders: Sequence[str], where: str
) -> list[int]:
    """Return the label of each of `images`.

    Args:
        text: of the file.
        images: names of the image files, sorted.
        folders: of the classes, by label.
        where: names the file in messages.

    Raises:
        IngestError: an image has no label, a label is no class, or a line cannot be understood.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and lines[0].lower().startswith("imageid"):
        lines = lines[1:]
    if all(line.isdigit() for line in lines):
        if len(lines) != len(images):
            raise IngestError(
                f"{where} has {len(lines)} labels for {len(images)} images; give one for each, in "
                "the order of their names"
            )
        return [_label(int(line) - 1, line, len(folders), where) for line in lines]
    numbers = {folder: label for label, folder in enumerate(folders)}
    found: dict[str, int] = {}
    for line in lines:
        words = line.replace(",", " ").split()
        if len(words) < 2:
            raise IngestError(
                f"{where} has the line {line[:60]!r}; give an image's name and its class"
            )
        name, word = words[0].rpartition("/")[2], words[1]
        if word in numbers:
            label = numbers[word]
        elif word.isdigit():
            label = _label(int(word), word, len(folders), where)
        else:
            raise IngestError(
                f"{where} has class {word!r} for {name}, which is none of the {len(folders)} "
                "classes; correct it, or the class list"
            )
        found[name.partition(".")[0]] = label
    missing = [name for name in images if name.partition(".")[0] not in found]
    if missing:
        raise IngestError(
            f"{where} has no label for {missing[0]} ({len(missing)} such); add it, or remove the "
            "image"
        )
    return [found[name.partition(".")[0]] for name in images]


def _label(label: int, word: str, num_classes: int, where: str) -> int:
    if not 0 <= label < num_classes:
        raise IngestError(
            f"{where} has label {word}, and there are {num_classes} classes; correct it, or the "
            "class list"
        )
    return label
