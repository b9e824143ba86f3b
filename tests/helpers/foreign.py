"""Small sources as people have them, by kind: tables of many dialects, archives, lists, folders.

`KINDS` names each with its options and what `ingest` is to say of it. `outcomes` runs them all.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from tests.helpers.source_makers import (
    CSV,
    FILES,
    IMAGES,
    JSONL,
    LABELS,
    NAMES,
    NONE,
    NUMBERS,
    PLAIN,
    ROWS,
    SPLIT_CSV,
    SPLITS,
    STRUCT,
    WORDS,
    Kind,
    arrow,
    empty_and_html,
    folders,
    ground_truth,
    gzipped,
    labelled,
    listing,
    metadata,
    other_suffixes,
    packed,
    parquet,
    retyped,
    shown,
    strangers,
    tars,
    twins,
    two_folders,
    unlabelled_test,
)

KINDS: dict[str, Kind] = {
    "convention": Kind(words="Parquet as Hugging Face writes it", make=labelled(NUMBERS, True)),
    "img": Kind(
        words="columns `img` and `labels`, by the features' metadata",
        make=parquet({"img": IMAGES, "labels": NUMBERS}, metadata("img", "labels")),
    ),
    "own columns": Kind(
        words="columns `x` and `z`, named by options",
        make=parquet({"x": IMAGES, "z": NUMBERS}),
        options={"image_column": "x", "label_column": "z"},
        names=PLAIN,
    ),
    "two labels": Kind(
        words="columns `fine_label` and `coarse_label`",
        make=parquet({"img": IMAGES, "fine_label": NUMBERS, "coarse_label": NUMBERS}),
        names=PLAIN,
        says="'fine_label' is taken for the label, not coarse_label",
    ),
    "no label column": Kind(
        words="no column of labels that is known",
        make=parquet({"image": IMAGES, "q": NUMBERS}),
        rows=NONE,
        says="no split with labels; name their column with --label-column",
    ),
    **{
        f"label {kind}": Kind(words=f"labels as {kind}", make=labelled(NUMBERS.cast(kind), True))
        for kind in (pa.int8(), pa.uint8(), pa.int32(), pa.uint64(), pa.float32(), pa.float64())
    },
    "label bool": Kind(
        words="labels as truth values",
        make=labelled(pa.array([bool(label % 2) for label in LABELS])),
        names=["false", "true"],
    ),
    "label string": Kind(words="labels as words", make=labelled(pa.array(WORDS))),
    "label dictionary": Kind(
        words="labels as a dictionary of words",
        make=labelled(pa.array(WORDS).dictionary_encode()),
    ),
    "label list": Kind(
        words="labels as lists of one",
        make=labelled(pa.array([[label] for label in LABELS])),
        names=PLAIN,
    ),
    "label lists": Kind(
        words="labels as lists of two",
        make=labelled(pa.array([[label, label] for label in LABELS])),
        rows=NONE,
        says="has 2 labels; give each image one class",
    ),
    "label fraction": Kind(
        words="labels with a fraction",
        make=labelled(pa.array([label + 0.5 for label in LABELS])),
        rows=NONE,
        says="no class numbers",
    ),
    "labels from 1": Kind(
        words="labels from 1 on",
        make=labelled(pa.array([label + 1 for label in LABELS])),
        names=PLAIN,
        says="there are 4 classes; 1 of them, such as 0, have no row",
    ),
    "label ids": Kind(
        words="labels that are ids, such as 1000000007",
        make=labelled(pa.array([1_000_000_007 + label for label in LABELS])),
        rows=NONE,
        says="only 3 of them occur: these are no class numbers",
    ),
    "label bytes": Kind(
        words="labels as words in bytes",
        make=labelled(pa.array([word.encode() for word in WORDS])),
    ),
    "label twins": Kind(
        words="labels that differ in a capital",
        make=labelled(pa.array([word.title() if n < 3 else word for n, word in enumerate(WORDS)])),
        names=["Ant", "Bee", "Cat", *NAMES],
        says="classes 'Ant' and 'ant' are two classes",
    ),
    "capitals": Kind(
        words="columns and suffixes in capitals",
        make=parquet({"Image": IMAGES, "Label": NUMBERS}, name="{split}.PQ"),
        names=PLAIN,
    ),
    "split column": Kind(
        words="Parquet with a column `split`",
        make=parquet(
            {"image": IMAGES, "label": NUMBERS, "split": pa.array(["test"] * ROWS)}, metadata()
        ),
        says="column 'split' is not followed",
    ),
    "two configurations": Kind(
        words="a split whose files lie in two folders",
        make=two_folders,
        rows={"train": 2 * ROWS},
        says="split 'train' is of the files of 2 folders, such as big and small",
    ),
    "large binary": Kind(
        words="images as large binary", make=shown(retyped(pa.large_binary(), pa.large_string()))
    ),
    "binary view": Kind(
        words="images as views", make=shown(retyped(pa.binary_view(), pa.string_view()))
    ),
    "plain binary": Kind(words="images as plain binary", make=shown(pa.array(FILES))),
    "bytes only": Kind(
        words="images as a struct of bytes alone",
        make=shown(pa.array([{"bytes": data} for data in FILES])),
    ),
    "null path": Kind(
        words="images with `path: null`",
        make=shown(
            pa.StructArray.from_arrays([pa.array(FILES), pa.nulls(ROWS)], ["bytes", "path"])
        ),
    ),
    "path only": Kind(
        words="images as paths without bytes",
        make=shown(pa.array([{"bytes": None, "path": "a.png"}] * ROWS, STRUCT)),
        rows=NONE,
        says="has a path (a.png) and no bytes",
    ),
    "path column": Kind(
        words="images as a column of paths",
        make=shown(pa.array(["a.png"] * ROWS)),
        rows=NONE,
        says="has texts in column 'image', not images; if they are paths, write paths",
    ),
    "pixels": Kind(
        words="images as lists of pixels",
        make=shown(pa.array([[0.0] * 12] * ROWS)),
        rows=NONE,
        says="holds no image files; save each image as a file's bytes",
    ),
    "train.parquet": Kind(
        words="files `train.parquet` and `test.parquet`",
        make=parquet({"image": IMAGES, "label": NUMBERS}, metadata(), name="{split}.parquet"),
    ),
    "sub-folders": Kind(
        words="files `default/train/0000.parquet`",
        make=parquet(
            {"image": IMAGES, "label": NUMBERS}, metadata(), name="default/{split}/0000.parquet"
        ),
    ),
    "no split": Kind(
        words="a file `part-00000-abc.parquet`",
        make=parquet(
            {"image": IMAGES, "label": NUMBERS},
            metadata(),
            name="part-00000-abc.parquet",
            splits=("train",),
        ),
        rows={"train": ROWS},
        says="are taken for train; --split NAME=PATTERN says otherwise",
    ),
    "patterns": Kind(
        words="files of any names, by `--split`",
        make=parquet({"image": IMAGES, "label": NUMBERS}, metadata(), name="{split}ing/x.parquet"),
        options={"split": {"train": "train*", "test": "test*"}},
    ),
    "gzip": Kind(
        words="Parquet compressed as a whole",
        make=gzipped,
        rows=NONE,
        says="compressed as a whole; unpack it with gunzip",
    ),
    "missing shard": Kind(
        words="a shard that is missing",
        make=parquet({"image": IMAGES, "label": NUMBERS}, name="{split}-00000-of-00002.parquet"),
        rows=NONE,
        says="lacks shard 1 of 2",
    ),
    **{
        f"unlabelled {name}": Kind(
            words=f"a test split {words}",
            make=parquet({"image": IMAGES, "label": NUMBERS}, metadata(), test=columns),
            rows={"train": ROWS},
            says=f"split 'test' {told}, and is left out (24 rows)",
        )
        for name, words, columns, told in (
            (
                "-1",
                "whose labels are -1",
                {"image": IMAGES, "label": pa.array([-1] * ROWS)},
                "has no row with a label",
            ),
            (
                "null",
                "whose labels are null",
                {"image": IMAGES, "label": pa.nulls(ROWS)},
                "has no row with a label",
            ),
            ("none", "without a label column", {"image": IMAGES}, "has no column of labels"),
        )
    },
    "one unlabelled": Kind(
        words="one row without a label",
        make=labelled(pa.array([-1, *LABELS[1:]])),
        rows=NONE,
        says="(label -1) has no label, and 1 of 24 rows of split 'test' have none",
    ),
    "names once": Kind(
        words="class names in one split only",
        make=parquet(
            {"image": IMAGES, "label": NUMBERS},
            metadata(),
            test={"image": IMAGES, "label": NUMBERS},
        ),
    ),
    "save_to_disk": Kind(words="Arrow files of `save_to_disk`", make=arrow),
    "webdataset": Kind(
        words="WebDataset's tars, labels as numbers in `.cls`",
        make=tars([str(label) for label in LABELS]),
        names=PLAIN,
    ),
    "webdataset json": Kind(
        words="WebDataset's tars, labels as words in `.json`",
        make=tars([json.dumps({"label": word}) for word in WORDS], "json"),
    ),
    "webdataset bare": Kind(
        words="tars without labels",
        make=tars(["x"] * ROWS, "txt"),
        rows=NONE,
        says="has no label; add 000000.cls",
    ),
    "webdataset bz2": Kind(
        words="tars packed with bzip2, labels as `1.0`",
        make=tars([f"{label}.0" for label in LABELS], ending="tar.bz2", mode="w:bz2"),
        names=PLAIN,
    ),
    "webdataset folders": Kind(
        words="a tar of class folders",
        make=tars(["x"] * ROWS, "txt", prefix="cat/"),
        rows=NONE,
        says="or unpack it, if its folders are the classes",
    ),
    "csv semicolons": Kind(
        words="CSV with semicolons",
        make=listing("{split}.csv", [line.replace(",", ";") for line in CSV]),
    ),
    "csv splits": Kind(
        words="CSV with a column `split`",
        make=listing("labels.csv", ["path,label,split", *SPLIT_CSV]),
        rows={"train": 16, "validation": 8},
        says="column 'split' of labels.csv says which split is whose",
    ),
    "csv again": Kind(
        words="CSV that names an image twice",
        make=listing("{split}.csv", [*CSV, CSV[1]]),
        rows={"train": ROWS + 1, "test": ROWS + 1},
        says="1 entries of",
    ),
    "csv headless": Kind(
        words="CSV without a heading",
        make=listing("{split}.csv", CSV[1:]),
        rows=NONE,
        says="or add a heading such as path,label",
    ),
    "csv": Kind(words="CSV of paths and words", make=listing("{split}.csv", CSV)),
    "jsonl": Kind(
        words="JSON lines of paths and numbers",
        make=listing("{split}.jsonl", JSONL),
        names=PLAIN,
    ),
    "csv absent": Kind(
        words="CSV that names an image that is not there",
        make=listing("{split}.csv", CSV, absent=True),
        rows=NONE,
        says="names pictures/5.png, which is not there",
    ),
    "folders": Kind(
        words="`train/<class>/` and `val/<class>/`",
        make=folders("train/a", "train/bb", "val/a", "val/bb"),
        rows=SPLITS,
        names=["a", "bb"],
    ),
    "Train": Kind(
        words="folders Train and Testing",
        make=folders("Train/a", "Train/bb", "Testing/a", "Testing/bb"),
        rows={"train": 8, "test": 8},
        names=["a", "bb"],
    ),
    "strangers": Kind(
        words="hidden, unknown, loose and deeper files beside the images",
        make=folders("train/a", "train/b", "val/a", "val/b", extra=strangers),
        rows=SPLITS,
        names=["a", "b"],
        says="left out: 1 images deeper in a class folder (such as 'b/deeper')",
    ),
    "suffixes": Kind(
        words="`.jfif`, `.avif`, `.jp2`, `.tga` and `.pgm`",
        make=folders("train/a", "train/bb", "val/a", "val/bb", extra=other_suffixes),
        rows={"train": 13, "validation": 8},
        names=["a", "bb"],
    ),
    "blanks": Kind(
        words="`classes.txt` with blanks in names",
        make=folders(
            "train/grey wolf",
            "train/cat",
            "val/cat",
            extra=lambda f: (f / "classes.txt").write_text("grey wolf\ncat\n"),
        ),
        rows={"train": 8, "validation": 4},
        names=["grey wolf", "cat"],
        says="1 of 2 classes, such as 'grey wolf', have no image in split 'validation'",
    ),
    "tiny imagenet": Kind(
        words="Tiny ImageNet's layout",
        make=folders("train/n1/images", "train/n22/images", extra=ground_truth),
        rows={"train": 8, "validation": 1},
        names=["n1", "n22"],
    ),
    "Train Data": Kind(
        words="folders `Train Data` and `val_set`",
        make=folders("Train Data/a", "Train Data/bb", "val_set/a", "val_set/bb"),
        rows=SPLITS,
        names=["a", "bb"],
    ),
    "wrapped": Kind(
        words="`dataset/train/<class>/` and no more beside it",
        make=folders("dataset/train/a", "dataset/train/bb", "dataset/val/a", "dataset/val/bb"),
        rows=SPLITS,
        names=["a", "bb"],
        says="the data is taken from dataset/, which holds train, val",
    ),
    "no images": Kind(
        words="empty files and web pages that are named like images",
        make=folders("train/a", "train/bb", "val/a", "val/bb", extra=empty_and_html),
        rows={"train": 9, "validation": 8},
        names=["a", "bb"],
        says="1 files that are no images, though named so (such as 'a/page.jpg')",
    ),
    "unlabelled images": Kind(
        words="a folder `test` of images without classes",
        make=folders("train/a", "train/bb", extra=unlabelled_test),
        rows={"train": 8},
        names=["a", "bb"],
        says="has no class folders and no list of labels, and is left out (1 images)",
    ),
    "accents": Kind(
        words="two folders `caf\u00e9` that Unicode writes differently",
        make=folders("train/caf\u00e9", "train/a", extra=twins),
        rows=NONE,
        says="differ only in how Unicode writes an accent",
    ),
    "images alone": Kind(
        words="images in no folder",
        make=folders("", extra=lambda f: (f / "notes.txt").write_text("x")),
        rows=NONE,
        says="holds images that are in no class's folder",
    ),
    "packed": Kind(
        words="`train.zip`",
        make=packed,
        rows=NONE,
        says="holds train.zip, which is packed as a whole; unpack it",
    ),
    "nested": Kind(
        words="class folders in folders",
        make=folders("train/animals/cat", "train/animals/dog"),
        rows=NONE,
        says="holds no image itself, but folders such as 'cat'",
    ),
    "share": Kind(
        words="class folders alone, with `--validation-share 0.25`",
        make=folders("a", "bb"),
        options={"validation_share": 0.25},
        rows={"train": 6, "validation": 2},
        names=["a", "bb"],
    ),
    "no share": Kind(
        words="class folders alone",
        make=folders("a", "bb"),
        rows=NONE,
        says="hold out a share of these images with --validation-share 0.1",
    ),
    "extra class": Kind(
        words="a class in val that train lacks",
        make=folders("train/a", "train/bb", "val/c"),
        rows=NONE,
        says="has class 'c', which train/ does not have",
    ),
    "empty class": Kind(
        words="an empty class folder",
        make=folders("train/a", extra=lambda f: (f / "train/b").mkdir()),
        rows=NONE,
        says="train/b holds no image",
    ),
    "one class": Kind(
        words="a single class",
        make=folders("train/only", "val/only"),
        rows={"train": 4, "validation": 4},
        names=["only"],
    ),
    "empty": Kind(
        words="an empty folder", make=Path.mkdir, rows=NONE, says="holds no IDX or CIFAR"
    ),
}
