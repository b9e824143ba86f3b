"""Makes `data/mnist-binary/`: MNIST as section 4.1 of the paper uses it, binary, one bit a pixel.

    python -m data.make_binary_mnist SOURCE [DESTINATION]

SOURCE is a folder of MNIST as Parquet in the Hugging Face convention (`train-*.parquet` and
`test-*.parquet`, grey images) or as the four original IDX files. Grey values above 127 become 1.
The result is the same, row for row, on every machine. DESTINATION must not exist.
"""

from __future__ import annotations

import sys
from pathlib import Path

from downpour.shuffler.errors import ShufflerError
from downpour.shuffler.ingest.config import IngestConfig
from downpour.shuffler.ingest.ingest import ingest

THRESHOLD = 127
SEED = 20150211
NOTICE = """\
MNIST, binary: 60,000 training and 10,000 test images of handwritten digits

Source:  The MNIST database of handwritten digits, by Yann LeCun, Corinna Cortes and
         Christopher J. C. Burges.
Licence: Creative Commons Attribution-ShareAlike 3.0
         (https://creativecommons.org/licenses/by-sa/3.0/), which covers the files of this
         folder too.
Changes: grey values above 127 became 1 and all others 0, one bit a pixel; the order of the
         images was shuffled within the training set and within the test set; images and labels
         are stored together as Parquet. No image was left out, added or relabelled.

Made by data/make_binary_mnist.py.
"""


def main(arguments: list[str]) -> int:
    """Build the folder; return the exit status."""
    if not 1 <= len(arguments) <= 2:
        sys.stderr.write("usage: python -m data.make_binary_mnist SOURCE [DESTINATION]\n")
        return 2
    default = Path(__file__).parent / "mnist-binary"
    destination = Path(arguments[1]) if len(arguments) == 2 else default
    config = IngestConfig(
        splits=("train", "test"), seed=SEED, binary_threshold=THRESHOLD, row_group_rows=10_000
    )
    try:
        manifest = ingest(arguments[0], destination, config)
    except ShufflerError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    (destination / "NOTICE").write_text(NOTICE)
    for name, split in manifest.splits.items():
        size = sum(shard.num_bytes for shard in split.shards)
        sys.stdout.write(f"{name}: {split.num_rows} rows, {size} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
