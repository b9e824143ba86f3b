"""Claims: rows and images come faster than from Ray Data and torch's DataLoader, no pair twice.

    rows     an epoch of encoded rows, start included, against Ray Data's random_shuffle
    images   photographs decoded and varied, against torch's DataLoader with as many workers and
             against a bare loop on one thread
    small    the same with 32x32 images, decoded by processes as replicas' are
    pairs    repeated pairs at the sizes of CIFAR-10 and ImageNet, counted
    memory   of a plan, of a shuffler, and of a dataset that the object store does not hold

CIFAR-10 is taken from `data/cifar10` where that is; otherwise images of its number and size are
made, as photographs are.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from downpour.benchmarks.baselines.shuffling import make_rows
from downpour.benchmarks.harness import BadSettings, Report, Say, Settings, median
from downpour.benchmarks.processes import measure_in_child
from downpour.cluster.config.paths import ROOT
from downpour.shuffler.processors import processors

PARTS = ("rows", "images", "small", "pairs", "memory")
CIFAR10 = ROOT / "data" / "cifar10"
DEADLINE_S = 900.0
_MODULE = "downpour.benchmarks.baselines.shuffling"


def run(settings: Settings, say: Say) -> Report:
    """Measure the parts asked for; of those that are compared, each in every round."""
    unknown = [name for name in settings.only if name not in PARTS]
    if unknown:
        raise BadSettings(f"shuffle has no part {unknown[0]!r}: choose of {', '.join(PARTS)}")
    parts = settings.only or PARTS
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as scratch:
        bench = _Bench(settings, say, Path(scratch))
        for part in parts:
            getattr(bench, f"_{part}")()
    return Report(
        name="shuffle",
        title="the shuffler",
        columns=("", "found", "compared with", "ratio"),
        rows=tuple(bench.rows),
        notes=(f"medians of {settings.repeat} round(s); ratios are within a round",),
        configuration={"parts": list(parts), **bench.configuration},
        result=bench.result,
        rounds=bench.rounds,
    )


class _Bench:
    """Runs children, and gathers what they find."""

    def __init__(self, settings: Settings, say: Say, scratch: Path) -> None:
        self._settings = settings
        self._say = say
        self._scratch = scratch
        self._workers = min(2, processors())
        self.rows: list[tuple[str, ...]] = []
        self.result: dict[str, Any] = {}
        self.rounds: list[Any] = [{} for _ in range(settings.repeat)]
        self.configuration: dict[str, Any] = {}

    def _child(self, task: str, **setup: Any) -> dict[str, Any]:
        self._say(f"shuffle: {task} {', '.join(f'{k}={v}' for k, v in setup.items())}")
        return measure_in_child(task, _MODULE, {"task": task, **setup}, DEADLINE_S)

    def _compare(self, part: str, tasks: tuple[str, ...], **setup: Any) -> list[dict[str, Any]]:
        found = []
        for record in self.rounds:
            record[part] = {task: self._child(task, **setup) for task in tasks}
            found.append(record[part])
        return found

    def _cifar(self) -> str:
        if CIFAR10.is_dir() and not self._settings.quick:
            return str(CIFAR10)
        folder = self._scratch / "cifar10-like"
        if not folder.exists():
            count = 3_000 if self._settings.quick else 50_000
            make_rows(str(folder), count=count, row_bytes=900, side=32)
        return str(folder)

    def _rows(self) -> None:
        data = self._cifar()
        self.configuration["rows"] = {"data": Path(data).name, "batch_size": 32}
        found = self._compare("rows", ("ours_rows", "ray_rows"), data=data)
        ours, ray = (median([f[t]["rows_per_s"] for f in found]) for t in ("ours_rows", "ray_rows"))
        ratio = median([f["ours_rows"]["rows_per_s"] / f["ray_rows"]["rows_per_s"] for f in found])
        first = median([1e3 * f["ours_rows"]["first_s"] for f in found])
        ray_first = median([1e3 * f["ray_rows"]["first_s"] for f in found])
        self.result["rows"] = {
            "rows_per_s": ours,
            "ray_data_rows_per_s": ray,
            "ratio_to_ray_data": ratio,
            "first_batch_ms": first,
            "ray_data_first_batch_ms": ray_first,
        }
        self.rows += [
            (
                "encoded rows/s, start included",
                f"{ours:,.0f}",
                f"Ray Data {ray:,.0f}",
                f"{ratio:.1f}",
            ),
            ("first mini-batch, ms", f"{first:.0f}", f"Ray Data {ray_first:,.0f}", ""),
        ]

    def _images(self) -> None:
        count = 256 if self._settings.quick else 2048
        self._decoding("images", ("ours_images",), count=count, side=500, size=224)

    def _small(self) -> None:
        count = 2000 if self._settings.quick else 20_000
        self._decoding("small", ("ours_ranks", "ours_loader"), count=count, side=32, size=32)

    def _decoding(
        self, part: str, ways: tuple[str, ...], *, count: int, side: int, size: int
    ) -> None:
        """Compare `ways` of ours with torch's loader; the first of them with a bare loop, too."""
        folder = str(self._scratch / part)
        make_rows(folder, count=count, row_bytes=65_000 if side > 100 else 900, side=side)
        setup = {"workers": self._workers, "seconds": self._settings.seconds, "size": size}
        self.configuration[part] = {"images": count, "side": side, **setup}
        tasks = (*ways, "torch_images", "plain_images")
        records = self._compare(part, tasks, data=folder, **setup)
        found = [
            {task: each["images_per_s"] for task, each in record.items()} for record in records
        ]
        rates = {task: median([f[task] for f in found]) for task in tasks}
        to_torch = {way: median([f[way] / f["torch_images"] for f in found]) for way in ways}
        first = ways[0]
        per_core = median([f[first] / (self._workers * f["plain_images"]) for f in found])
        # What other processes take of the processors weighs on two workers, and not on one loop.
        used, plain_used = (
            median([record[task]["cpu_us_per_image"] for record in records])
            for task in (first, "plain_images")
        )
        torch, plain = rates["torch_images"], rates["plain_images"]
        self.result[part] = {
            "images_per_s": rates[first],
            "torch_dataloader_images_per_s": torch,
            "plain_loop_images_per_s": plain,
            "ratio_to_torch_dataloader": to_torch[first],
            "ratio_to_plain_loop_per_core": per_core,
            "cpu_us_per_image": used,
            "plain_loop_cpu_us_per_image": plain_used,
        }
        words = {
            "ours_images": "threads",
            "ours_ranks": "processes with a feed each",
            "ours_loader": "workers of a DataLoader with our feed",
        }
        for way in ways:
            if way != first:
                self.result[part][f"{way}_images_per_s"] = rates[way]
                self.result[part][f"{way}_ratio_to_torch_dataloader"] = to_torch[way]
            self.rows.append(
                (
                    f"{side}-pixel JPEGs decoded and varied/s, {self._workers} {words[way]}",
                    f"{rates[way]:,.0f}",
                    f"torch DataLoader, {self._workers} workers {torch:,.0f}",
                    f"{to_torch[way]:.2f}",
                )
            )
        self.rows.append(
            (
                f"{side}-pixel JPEGs decoded and varied/s, each of {self._workers} {words[first]}",
                f"{rates[first] / self._workers:,.0f}",
                f"bare loop {plain:,.0f}",
                f"{per_core:.2f}",
            )
        )
        self.rows.append(
            (
                f"{side}-pixel JPEGs, us of a processor for each",
                f"{used:,.0f}",
                f"bare loop {plain_used:,.0f}",
                f"{plain_used / used:.2f}",
            )
        )

    def _pairs(self) -> None:
        sizes = {"cifar10": (50_000, 50), "imagenet": (1_281_167, 100)}
        if self._settings.quick:
            sizes = {"cifar10": (5_000, 20)}
        for name, (num_rows, epochs) in sizes.items():
            found = self._child("pairs", num_rows=num_rows, epochs=epochs)
            self.result[f"pairs_{name}"] = found
            self.rows.append(
                (
                    f"repeated pairs, {num_rows:,} rows, {epochs} epochs",
                    f"{found['repeats']:,}",
                    f"chance {found['repeats_by_chance']:,.0f}",
                    "",
                )
            )

    def _memory(self) -> None:
        quick = self._settings.quick
        plan = self._child("planning", num_rows=10**9)
        self.result["planning"] = plan
        self.rows += [
            ("planning for 10^9 rows, MB", f"{plan['peak_mb']:.1f}", "", ""),
            ("finding the rows in mid-epoch, ms", f"{plan['resume_ms']:.1f}", "10^9 rows", ""),
        ]
        many = str(self._scratch / "many")
        make_rows(many, count=20_000 if quick else 1_281_167, row_bytes=100, side=0)
        for name, data in (("cifar10", self._cifar()), ("many", many)):
            found = [self._child("resume", data=data) for _ in range(self._settings.repeat)]
            again = {key: median([each[key] for each in found]) for key in found[0]}
            self.result[f"resume_{name}"] = again
            self.rows.append(
                (
                    f"resume, open files to first mini-batch, {again['rows']:,.0f} rows, ms",
                    f"{again['first_batch_ms']:.0f}",
                    f"opening {again['opening_ms']:.0f}",
                    "",
                )
            )
        cache_mb, store_mb = (16, 80) if quick else (64, 90)
        base = 2_000 if quick else 4_000
        for times in (1, 4):
            folder = str(self._scratch / f"bytes-{times}")
            make_rows(folder, count=base * times, row_bytes=(12 if quick else 25) << 10, side=0)
            found = self._child("resident", data=folder, cache_mb=cache_mb)
            self.result[f"resident_{times}x"] = found
            self.rows.append(
                (
                    f"a shuffler's memory at most, cache of {cache_mb} MB, MB",
                    f"{found['grown_mb']:.0f}",
                    f"dataset of {found['dataset_mb']:.0f} MB; first windows "
                    f"{found['grown_first_windows_mb']:.0f}, last "
                    f"{found['grown_last_windows_mb']:.0f}",
                    "",
                )
            )
        if quick:
            return
        through = self._child("store", data=folder, cache_mb=cache_mb, store_mb=store_mb)
        self.result["store"] = through
        share = through["dataset_mb"] / store_mb
        self.rows.append(
            (
                f"an epoch through an object store of {store_mb} MB",
                "each row once" if through["each_row_once"] else "ROWS LOST",
                f"dataset of {through['dataset_mb']:.0f} MB",
                f"{share:.1f}",
            )
        )
