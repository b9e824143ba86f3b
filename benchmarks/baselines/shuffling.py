"""One measurement of `benchmarks.shuffle`, in a process of its own: what its setup's task names."""

from __future__ import annotations

import gc
import json
import logging
import math
import multiprocessing
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from numpy.typing import NDArray

from downpour.benchmarks.processes import die_with_parent
from downpour.shuffler.actor import ShufflerActor
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.feed import Feed
from downpour.shuffler.images.augment import AugmentConfig
from downpour.shuffler.images.rows import image_buffers
from downpour.shuffler.images.specs import ImageSpec
from downpour.shuffler.plan.pairs import count_pairs
from downpour.shuffler.plan.plan import Plan
from downpour.shuffler.spec import ShufflerSpec

SIZE = 224
ALL = AugmentConfig(random_crop=True, mirror=True, distortion="full")


def ours_rows(data: str, **_: Any) -> dict[str, Any]:
    """An epoch of encoded rows in mini-batches of 32; the files are opened before."""
    dataset = Dataset.open(data, "train")
    return _drain(lambda: iter(Feed(dataset)), len)


def ray_rows(data: str, **_: Any) -> dict[str, Any]:
    """The same by Ray Data, on a Ray that has been started; it reads the footers itself."""
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    files = [str(path) for path in sorted(Path(data).glob("train-*.parquet"))]
    try:
        return _drain(
            lambda: (
                ray.data.read_parquet(files)
                .random_shuffle()
                .iter_batches(batch_size=32, batch_format="pyarrow")
            ),
            len,
        )
    finally:
        ray.shutdown()


def _drain(start: Callable[[], Any], size: Callable[[Any], int]) -> dict[str, Any]:
    began_s = time.perf_counter()
    first_s = rows = 0.0
    for batch in start():
        first_s = first_s or time.perf_counter() - began_s
        rows += size(batch)
    elapsed_s = time.perf_counter() - began_s
    return {"rows": rows, "first_s": first_s, "rows_per_s": rows / elapsed_s}


def ours_images(data: str, workers: int, seconds: float, size: int, **_: Any) -> dict[str, Any]:
    """Decoded and varied images by the feed, with `workers` threads."""
    import torch

    feed = _feed(data, size, num_threads=workers)
    return _rate(((torch.from_numpy(x), y) for x, y in feed), seconds)


def ours_ranks(data: str, workers: int, seconds: float, size: int, **_: Any) -> dict[str, Any]:
    """The same in `workers` processes, a feed and a thread each, which share the mini-batches.

    So do processes of replicas with small images: nothing that is decoded leaves its process.
    """
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(workers)
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_set_barrier, initargs=(ready,)
    ) as pool:
        ranks = [pool.submit(_rank, data, seconds, size, rank, workers) for rank in range(workers)]
        found = [rank.result() for rank in ranks]
    rates = [each["images_per_s"] for each in found]
    used = [each["cpu_us_per_image"] for each in found]
    return {
        "images_per_s": sum(rates),
        "cpu_us_per_image": sum(used) / workers,
        "by_process": rates,
    }


_BARRIER: list[Any] = []


def _set_barrier(barrier: Any) -> None:
    _BARRIER.append(barrier)


def _rank(data: str, seconds: float, size: int, rank: int, world_size: int) -> dict[str, Any]:
    feed = _feed(data, size, num_threads=1, rank=rank, world_size=world_size)
    return _rate(iter(feed), seconds, lambda: _BARRIER[0].wait(60))


def ours_loader(data: str, workers: int, seconds: float, size: int, **_: Any) -> dict[str, Any]:
    """The same with the feed in the worker processes of a `DataLoader`."""
    from torch.utils.data import DataLoader

    from downpour.workers.torch_feed import TorchFeed

    feed = TorchFeed(data, **_options(size))
    return _rate(iter(DataLoader(feed, None, num_workers=workers)), seconds)


def _options(size: int) -> dict[str, Any]:
    spec = ImageSpec(height=size, width=size)
    return {"image": spec, "augment": ALL, "epochs": 10**6, "past_bound": "rekey"}


def _feed(data: str, size: int, **options: Any) -> Feed:
    return Feed(data, **_options(size), **options)


def torch_images(data: str, workers: int, seconds: float, size: int, **_: Any) -> dict[str, Any]:
    """The same operations by torch's DataLoader, with `workers` processes and its own collation."""
    import torch
    from torch.utils.data import DataLoader

    class Images(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.files = _files(data)

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            rng = np.random.default_rng(torch.randint(2**62, ()).item())
            planes = np.empty((3, size, size), np.float32)
            plain_image(self.files[index], rng, size, planes)
            return torch.from_numpy(planes), 0

    loader = DataLoader(
        Images(), batch_size=32, shuffle=True, num_workers=workers, persistent_workers=True
    )

    def batches() -> Iterator[Any]:
        while True:
            yield from loader

    return _rate(batches(), seconds)


def plain_images(data: str, seconds: float, size: int, **_: Any) -> dict[str, Any]:
    """The same operations in a bare loop on one thread, images in memory."""
    files = _files(data)
    rng = np.random.default_rng(0)
    inputs = np.empty((32, 3, size, size), np.float32)

    def batches() -> Iterator[Any]:
        while True:
            for start in range(0, len(files) - 31, 32):
                for number in range(32):
                    plain_image(files[start + number], rng, size, inputs[number])
                yield inputs, inputs

    return _rate(batches(), seconds)


def plain_image(data: bytes, rng: np.random.Generator, size: int, out: NDArray[np.float32]) -> None:
    """Decode, crop at random, resize, distort, mirror, and scale to [0, 1]: as one writes it."""
    pixels = simplejpeg.decode_jpeg(data)
    height, width = pixels.shape[:2]
    tall, wide = height, width
    for _ in range(10):
        share = rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3)))
        tall = round(math.sqrt(share * height * width / ratio))
        wide = round(math.sqrt(share * height * width * ratio))
        if 0 < tall <= height and 0 < wide <= width:
            break
    else:
        tall, wide = height, width
    top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
    image = cv2.resize(pixels[top : top + tall, left : left + wide], (size, size))
    b, k, s = rng.uniform(0.5, 1.5, 3)
    grey = np.array([0.299, 0.587, 0.114])
    matrix = np.empty((3, 4))
    matrix[:, :3] = b * k * (s * np.eye(3) + (1 - s) * grey)
    matrix[:, 3] = b * (1 - k) * (grey @ cv2.mean(image)[:3]) + rng.normal(0, 5, 3)
    image = cv2.transform(image, matrix)
    if rng.random() < 0.5:
        image = cv2.flip(image, 1)
    np.copyto(out, image.transpose(2, 0, 1))
    np.divide(out, np.float32(255), out=out)


def _files(data: str) -> list[bytes]:
    dataset = Dataset.open(data, "train")
    files: list[bytes] = []
    for shard in dataset.shards:
        for group in pq.read_table(shard.path).to_batches():
            files += [bytes(b or b"") for b in image_buffers(group.column("image"))]
    return files


def _rate(
    batches: Iterator[Any], seconds: float, ready: Callable[[], Any] | None = None
) -> dict[str, Any]:
    """Images a second in steady state, after the workers have started and pipes have filled."""
    for _ in range(8):
        next(batches)
    if ready is not None:
        ready()
    began_s = now_s = time.perf_counter()
    used_s = time.process_time()
    images = 0
    while now_s < began_s + seconds:
        images += len(next(batches)[0])
        now_s = time.perf_counter()
    used_s = time.process_time() - used_s  # by all threads of this process, and no others
    return {"images_per_s": images / (now_s - began_s), "cpu_us_per_image": 1e6 * used_s / images}


def pairs(num_rows: int, epochs: int, **_: Any) -> dict[str, Any]:
    """Repeated pairs of all rows over all these epochs, counted."""
    began_s = time.perf_counter()
    found = count_pairs(Plan(num_rows=num_rows), epochs)
    return {
        "repeats": found.repeats,
        "meetings": found.meetings,
        "repeats_by_chance": found.chance,
        "seconds": time.perf_counter() - began_s,
    }


def planning(num_rows: int, **_: Any) -> dict[str, Any]:
    """Memory of a plan in use, and the time to find the rows of a window in mid-epoch."""
    tracemalloc.start()
    plan = Plan(num_rows=num_rows, seed=1)
    order = plan.window_order(7)
    rows, _ = plan.rows_of(7, plan.window_batches_order(7, int(order[len(order) // 2])))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del order, rows
    began_s = time.perf_counter()
    turn, offset = plan.locate(3, plan.num_batches // 3)
    batches = plan.window_batches_order(3, plan.window_at(3, turn))[offset:]
    plan.rows_of(3, batches)
    return {"peak_mb": peak / 2**20, "resume_ms": 1e3 * (time.perf_counter() - began_s)}


def resume(data: str, **_: Any) -> dict[str, Any]:
    """Opening a dataset, and from there to the first mini-batch after a place in mid-epoch."""
    began_s = time.perf_counter()
    dataset = Dataset.open(data, "train")
    opened_s = time.perf_counter()
    feed = Feed(dataset)
    state = feed.state_dict()
    feed.load_state_dict({**state, "place": feed.plan.num_batches // 2})
    loaded_s = time.perf_counter()
    next(iter(feed))
    return {
        "rows": dataset.num_rows,
        "opening_ms": 1e3 * (opened_s - began_s),
        "state_ms": 1e3 * (loaded_s - opened_s),
        "first_batch_ms": 1e3 * (time.perf_counter() - opened_s),
    }


def _spec(data: str, plan: Plan, cache_mb: int) -> ShufflerSpec:
    return ShufflerSpec(data=data, plan=plan, num_classes=1 << 30, cache_bytes=cache_mb << 20)


def resident(data: str, cache_mb: int, **_: Any) -> dict[str, Any]:
    """What a shuffler's process has grown by after the first windows, and at most in two epochs."""
    dataset = Dataset.open(data, "train")
    plan = Plan(num_rows=dataset.num_rows, window_batches=16)
    gc.collect()
    before, peak_before = _resident_kb(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shuffler = ShufflerActor(_spec(data, plan, cache_mb))
    num_bytes, grown = 0, []
    times = np.zeros(dataset.num_rows, dtype=np.int64)
    for epoch in range(2):
        for window in plan.window_order(epoch).tolist():
            batches = tuple(plan.window_batches_order(epoch, window).tolist())
            part = shuffler.deliver(epoch, batches)
            np.add.at(times, part.rows[part.positions], 1)
            num_bytes += part.batch.nbytes
            grown.append(_resident_kb() - before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if peak == peak_before:  # it was higher once, while modules were imported
        peak = before + max(grown)
    return {
        "dataset_mb": num_bytes / 2 / 2**20,
        "rows": dataset.num_rows,
        "complete": bool((times == 2).all()),
        "window_mb": part.batch.nbytes / 2**20,
        "windows": len(grown),
        "grown_first_windows_mb": max(grown[:8]) / 2**10,
        "grown_last_windows_mb": max(grown[-8:]) / 2**10,
        "grown_mb": (peak - before) / 2**10,
        "allocated_mb": pa.default_memory_pool().max_memory() / 2**20,
    }


def _resident_kb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def store(data: str, cache_mb: int, store_mb: int, **_: Any) -> dict[str, Any]:
    """A whole epoch through an object store that is smaller than the dataset."""
    import ray

    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=store_mb << 20,
    )
    dataset = Dataset.open(data, "train")
    plan = Plan(num_rows=dataset.num_rows, window_batches=16)
    remote: Any = ray.remote
    shuffler = remote(ShufflerActor).options(num_cpus=0, max_concurrency=2)
    try:
        actor = shuffler.remote(_spec(data, plan, cache_mb))
        seen = np.zeros(dataset.num_rows, dtype=np.int64)
        num_bytes, waiting = 0, []
        for window in [*plan.window_order(0).tolist(), None, None]:
            if window is not None:
                batches = tuple(plan.window_batches_order(0, window).tolist())
                waiting.append(actor.deliver.remote(0, batches))
            if len(waiting) > 2 or window is None:
                part = ray.get(waiting.pop(0))
                np.add.at(seen, part.rows[part.positions], 1)
                num_bytes += part.batch.nbytes
        return {
            "dataset_mb": num_bytes / 2**20,
            "store_mb": store_mb,
            "each_row_once": bool((seen == 1).all()),
        }
    finally:
        ray.shutdown()


def make_rows(folder: str, count: int, row_bytes: int, side: int, split: str = "train") -> None:
    """A split of `count` rows: JPEGs of `side` pixels, or where that is 0, random bytes."""
    rng = np.random.default_rng(0)
    Path(folder).mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
        ]
    )
    group = max(1, min(1000, (4 << 20) // max(1, row_bytes)))
    path = Path(folder) / f"{split}-00000-of-00001.parquet"
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, count, group):
            rows = range(start, min(start + group, count))
            images = [
                {"bytes": _jpeg(rng, side) if side else rng.bytes(row_bytes), "path": f"{i}.jpg"}
                for i in rows
            ]
            columns = {"image": images, "label": [i % 10 for i in rows]}
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))


def _jpeg(rng: np.random.Generator, side: int) -> bytes:
    """A picture with a photograph's smoothness and noise, `side` wide and 3/4 of that high."""
    height, width = (side, side) if side < 100 else (side * 3 // 4, side)
    coarse = rng.integers(0, 256, (max(3, height // 16), max(4, width // 16), 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    noise = rng.integers(-12, 13, smooth.shape, dtype=np.int16)
    pixels = np.clip(smooth + noise, 0, 255).astype(np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420"))


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    task.__name__: task
    for task in (
        *(ours_rows, ray_rows, ours_images, ours_ranks, ours_loader, torch_images, plain_images),
        *(pairs, planning, resume, resident, store),
    )
}


def main() -> None:
    """Do the task of the setup, and write what came out."""
    die_with_parent()
    setup = json.loads(sys.argv[1])
    value = TASKS[setup.pop("task")](**setup)
    result = Path(sys.argv[2])
    partial = result.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.rename(result)


if __name__ == "__main__":
    main()
