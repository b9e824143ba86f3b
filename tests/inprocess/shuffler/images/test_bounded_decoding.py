"""No small file takes much memory or time, whatever its header says: ten formats, seeded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]

MOST_BYTES = 1 << 30
MOST_SECONDS = 5.0
LARGEST_FILE = 1 << 20

SCRIPT = """
import json, sys, time
import numpy as np
import pyarrow as pa
from downpour.shuffler.dataset.image_columns import IMAGE_TYPE
from downpour.shuffler.errors import DecodeError
from downpour.shuffler.images.decode import Decoder, decode_image
from downpour.shuffler.images.specs import ImageSpec
from downpour.shuffler.images.augment import AugmentConfig
from downpour.shuffler.images.views import decode_views
from tests.helpers.odd_headers import FORMATS, filled, patched, scans

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) << 10

def ways(data):
    batch = pa.record_batch(
        [pa.array([{"bytes": data, "path": None}], IMAGE_TYPE), pa.array([0])], ["image", "label"]
    )
    rows = np.zeros(1, np.int64)
    spec = ImageSpec(height=224, width=224, fit="crop")
    varied = Decoder(spec=spec, augment=AugmentConfig(random_crop=True))
    yield lambda: decode_image(data, 3)
    yield lambda: Decoder(spec=spec).decode(batch, rows=rows)
    yield lambda: varied.decode(batch, rows=rows)
    yield lambda: decode_views(batch, spec, 144)

def files(seed, count):
    random = np.random.default_rng(seed)
    sides = [1, 2, 63, 1000, 2500, 4000, 5500, 7000, 16383, 32768, 65535, 100000, 2**31 - 1]
    for number in range(count):
        kind = FORMATS[number % len(FORMATS)]
        height, width = (int(s) for s in random.choice(sides, 2))
        yield f"{kind} {height}x{width}", patched(kind, height, width)
    yield from filled(random, count // 12)
    yield "scans", scans(6000, 6000, 20000)

for name, data in files(int(sys.argv[1]), int(sys.argv[2])):
    data = data[: 1 << 20]
    for way, decode in enumerate(ways(data)):
        open("/proc/self/clear_refs", "w").write("5")
        began, before = time.perf_counter(), peak()
        try:
            decode()
            outcome = "decoded"
        except DecodeError as error:
            outcome = str(error)
        print(json.dumps([name, way, peak(), time.perf_counter() - began, outcome]), flush=True)
"""


def run(seed: int, count: int) -> list[tuple[str, int, int, float, str]]:
    command = [sys.executable, "-c", SCRIPT, str(seed), str(count)]
    done = subprocess.run(
        command, cwd=ROOT, check=True, timeout=280, capture_output=True, text=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[tuple[str, int, int, float, str]]) -> None:
    for name, way, peak, seconds, outcome in found:
        assert peak < MOST_BYTES, (name, way, peak, outcome)
        assert seconds < MOST_SECONDS, (name, way, seconds, outcome)
        assert "\n" not in outcome
    assert any(row[4] == "decoded" for row in found)
    assert any("resize it" in row[4] for row in found)


def test_a_small_file_takes_bounded_memory_and_time():
    check(run(seed=0, count=33))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_small_files_take_bounded_memory_and_time(seed):
    check(run(seed, count=440))
