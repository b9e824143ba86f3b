"""What travels with a job to a cluster, and how large it is, before anything is sent.

Ray packs the working directory into one archive, without what `.gitignore` and `.rayignore` name.
Its own walk decides here too, so that what is said is what is sent. Not here: the job (`jobs`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from downpour.cluster.config.paths import PACKAGE, ROOT, checkout
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError

EXCLUDES = (".git", ".venv", "__pycache__", "/runs")
"""What no job needs: gitignore patterns, from the working directory on."""
CHECKOUT_EXCLUDES = ("/docs", "/tests", "/downpour", "/benchmarks/results")
"""The same in a checkout of Downpour, whose code travels as the package."""

DATA_FOLDER = "data"
"""Where datasets usually are; of these a job gets its own."""
INSTALLED = {"site-packages", "dist-packages"}
"""Folders of packages that somebody installed, which the nodes need installed as well."""
MOST_FOLDERS = 4
"""Folders that the error about a large upload names."""
_MOSTLY = 0.9
"""If a folder within one has this share of its bytes, that one is named instead."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """The files of a working directory that Ray sends."""

    folder: Path
    sizes: dict[PurePosixPath, int]
    """Bytes of each file, by its path from the folder."""
    left_out: tuple[str, ...]
    """Names in the folder that are not sent, in order; folders end in a slash."""
    data: str | None = None
    """The dataset that `excludes` kept; None: all of them."""
    modules: dict[Path, int] = field(default_factory=dict)
    """Bytes of each module from elsewhere that is sent as well, by its file or folder."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all files. Ray's archive does not compress them."""
        return sum(self.sizes.values())

    def has(self, path: Path) -> bool:
        """Whether a file, or anything in a folder, is sent; `path` is relative or absolute."""
        try:
            inside = PurePosixPath((self.folder / path).relative_to(self.folder))
        except ValueError:
            return False
        return any(inside == file or inside in file.parents for file in self.sizes)

    def line(self) -> str:
        """What is sent and what is not, for people."""
        stays = f"; not {', '.join(self.left_out)}" if self.left_out else ""
        size = _mebibytes(self.num_bytes)
        also = ", ".join([*(f"{p} ({_mebibytes(n)})" for p, n in self.modules.items()), "downpour"])
        return f"uploading {self.folder} ({len(self.sizes):,} files, {size}{stays}) and {also}"


def excludes(working_dir: Path, data: str | None = None) -> list[str]:
    """The patterns that are left out of a working directory besides those of its ignore files.

    Args:
        working_dir: the folder.
        data: the dataset of the run, after which other datasets in the folder `data` are left out;
            None leaves none of them out.
    """
    own = CHECKOUT_EXCLUDES if checkout() == working_dir.resolve() else ()
    environments = (f"/{path.parent.name}" for path in working_dir.glob("*/pyvenv.cfg"))
    others = () if data is None else _other_datasets(working_dir, data)
    return [*EXCLUDES, *own, *sorted(environments), *others]


def _other_datasets(working_dir: Path, data: str) -> list[str]:
    """What is in the folder `data` and not the run's dataset.

    The same patterns hold for the package, so what it has there itself is not among them.
    """
    needed = () if "://" in data or Path(data).is_absolute() else Path(data).parts
    folder = working_dir / DATA_FOLDER
    if needed == (DATA_FOLDER,) or not folder.is_dir():
        return []
    ours = PACKAGE / DATA_FOLDER
    keep = {path.name for path in ours.iterdir()} if ours.is_dir() else set()
    if needed[:1] == (DATA_FOLDER,):
        keep.add(needed[1])
    names = sorted(path.name for path in folder.iterdir() if path.name not in keep)
    return [f"/{DATA_FOLDER}/{_escaped(name)}" for name in names]


def _escaped(name: str) -> str:
    """A name as a pattern that matches nothing else."""
    return "".join(f"\\{c}" if c in "*?[]!#\\ " else c for c in name)


def measure(working_dir: Path, *, data: str | None = None, modules: Sequence[Path] = ()) -> Upload:
    """The files that Ray would send from `working_dir`.

    Args:
        working_dir: the folder.
        data: see `excludes`.
        modules: files and folders of modules from elsewhere that are sent as well.

    Raises:
        UserError: a file or folder in it cannot be read.
    """
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE
    from ray._private.runtime_env import packaging

    sizes: dict[PurePosixPath, int] = {}
    seen: set[str] = set()

    def visit(path: Path) -> None:
        name = path.relative_to(working_dir)
        if path.is_file():
            sizes[PurePosixPath(name)] = path.stat().st_size
        elif any(path.iterdir()):
            return  # a folder that is not empty is sent only by what is in it
        seen.update(name.parts[:1])

    patterns = excludes(working_dir, data)
    quiet = logging.getLogger(f"{__name__}.walk")
    quiet.setLevel(logging.CRITICAL)  # what goes wrong is raised as well
    try:
        packaging._dir_travel(
            working_dir,
            [packaging._get_excludes(working_dir, patterns)],
            visit,
            include_gitignore=os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1",
            logger=quiet,
        )
        names = {p.name: p.name + "/" * p.is_dir() for p in working_dir.iterdir()}
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}), and would be sent with the job: "
            "name it in .rayignore"
        ) from None
    left_out = [shown for name, shown in sorted(names.items()) if name not in seen]
    if DATA_FOLDER in seen:
        left_out += [pattern[1:] for pattern in patterns if pattern.startswith(f"/{DATA_FOLDER}/")]
    return Upload(
        folder=working_dir,
        sizes=sizes,
        left_out=tuple(left_out),
        data=data,
        modules={path: _bytes_of(path) for path in modules},
    )


def _bytes_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def check_size(upload: Upload, limit: int | None = None) -> None:
    """Refuse an upload that Ray would refuse after it was packed and sent.

    Args:
        upload: what would be sent.
        limit: bytes that are too many; None takes Ray's.

    Raises:
        UserError: it has that many bytes; the line names the largest folders.
    """
    if limit is None:
        from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
        from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE

        # The dashboard takes less than the store behind it, and answers 413 to more.
        limit = min(GCS_STORAGE_MAX_SIZE, DASHBOARD_CLIENT_MAX_SIZE)
    for path, num_bytes in upload.modules.items():
        if num_bytes >= limit:
            raise UserError(
                f"{path} has {_mebibytes(num_bytes)} to upload, and Ray takes less than "
                f"{_mebibytes(limit)}: move what is not code out of it"
            )
    if upload.num_bytes < limit:
        return
    named = ", ".join(f"{name} ({_mebibytes(size)})" for name, size in largest(upload))
    raise UserError(
        f"{upload.folder} has {_mebibytes(upload.num_bytes)} to upload, and Ray takes less than "
        f"{_mebibytes(limit)}: name what the job does not need in .rayignore; largest are {named}"
    )


def largest(upload: Upload) -> list[tuple[str, int]]:
    """The folders, or files at the top, with most bytes, each with its bytes; largest first."""
    top = PurePosixPath()
    bytes_of: Counter[PurePosixPath] = Counter()
    for file, size in upload.sizes.items():
        for folder in file.parents:
            bytes_of[folder] += size
    folders_in: defaultdict[PurePosixPath, list[PurePosixPath]] = defaultdict(list)
    for folder in bytes_of:
        if folder != top:
            folders_in[folder.parent].append(folder)
    found = [(str(f), size) for f, size in upload.sizes.items() if f.parent == top]
    for path in folders_in[top]:
        inner = path
        while folders_in[inner]:
            below = max(folders_in[inner], key=bytes_of.__getitem__)
            if bytes_of[below] < _MOSTLY * bytes_of[inner]:
                break
            inner = below
        found.append((f"{inner}/", bytes_of[inner]))
    return sorted(found, key=lambda pair: -pair[1])[:MOST_FOLDERS]


def missing(upload: Upload, recipe: str, config: RunConfig) -> Iterator[str]:
    """Lines on what a recipe needs and the upload does not bring.

    Raises:
        UserError: it is in the working directory, and an ignore file or Downpour leaves it out.
    """
    for module in _own_names(recipe, config):
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None or Path(spec.origin).is_relative_to(PACKAGE):
            continue
        path = Path(spec.origin)
        if any(path == sent or sent in path.parents for sent in upload.modules):
            continue
        if not path.is_relative_to(upload.folder):
            yield f"{module} is {path}, which is not sent: the nodes need it installed"
        elif not upload.has(path):
            raise _left_out(module, path, upload)
    data = config.data.data
    if "://" not in data and not Path(data).is_absolute() and not upload.has(Path(data)):
        raise _left_out("data", upload.folder / data, upload)


def _own_names(recipe: str, config: RunConfig) -> list[str]:
    """The modules of the user's that a recipe names."""
    names = [recipe, config.model.model, config.model.loss, config.server.schedule.function or ""]
    return list(dict.fromkeys(name.partition(":")[0] for name in names if ":" in name))


def own_modules(working_dir: Path, recipe: str, config: RunConfig) -> list[Path]:
    """The files and folders of modules that a recipe imports, and that nodes do not have.

    They are those that lie neither in the working directory, which is sent anyway, nor where
    Python and its packages are installed: on PYTHONPATH, or an editable installation.
    """
    names = _own_names(recipe, config)
    for name in names:
        with contextlib.suppress(ImportError):  # what cannot be imported, `missing` tells of
            importlib.import_module(name)
    if not names:
        return []
    pythons = [Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)]
    known = [working_dir.resolve(), PACKAGE.resolve(), ROOT.resolve(), *pythons]
    found: dict[Path, None] = {}
    for name, module in sorted(sys.modules.items()):
        if "." in name or name == "__main__":
            continue
        places = getattr(module, "__path__", None) or [getattr(module, "__file__", None)]
        place = next((Path(p) for p in places if isinstance(p, str)), None)
        if place is None or not place.exists() or place.suffix not in ("", ".py"):
            continue
        # Environments may lie on one another; what is in any of them was installed.
        if INSTALLED & {*place.parts, *place.resolve().parts}:
            continue
        if not any(place.resolve().is_relative_to(root) for root in known):
            found[place] = None
    return list(found)


def _left_out(what: str, path: Path, upload: Upload) -> UserError:
    patterns: Sequence[str] = excludes(upload.folder, upload.data)
    return UserError(
        f"{what} is {path}, which is not sent with the job: .gitignore, .rayignore or Downpour's "
        f"own list ({', '.join(patterns)}) leaves it out; take it out of there or move it"
    )


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
