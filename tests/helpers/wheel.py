"""Downpour as a user has it: built as a wheel, in an environment that knows no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.commands import ROOT

BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
SOURCES = (
    *("pyproject.toml", "README.md", "LICENSE", "NOTICE", "requirements.lock", "ray_cluster.yaml"),
    *("downpour", "cluster", "models", "paramserver", "shuffler", "workers", "benchmarks", "data"),
)


DEADLINE_S = 180.0
"""For a command: twice what a training run takes on a busy machine."""


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """What a command that must succeed prints."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def build(folder: Path) -> Path:
    """Build the wheel of this checkout in `folder`, from a copy: setuptools leaves files behind."""
    copy = folder / "checkout"
    copy.mkdir(parents=True)
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results", "cifar10", "imagenet")
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, copy / name)
    built = run(sys.executable, "-c", BUILD, str(folder), cwd=copy).splitlines()[-1]
    return folder / built


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the pinned dependencies of the one that runs the tests."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def downpour(self) -> Path:
        """The command, once a wheel is installed."""
        return self.folder / "bin" / "downpour"

    @property
    def packages(self) -> Path:
        """Where its own packages are."""
        names = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "lib" / names / "site-packages"

    def variables(self, home: Path) -> dict[str, str]:
        """The variables of a shell in which it is active, of a user whose home is `home`."""
        kept = {k: os.environ[k] for k in ("LANG", "TMPDIR", "RAY_TMPDIR") if k in os.environ}
        return {
            **kept,
            "PATH": os.pathsep.join([str(self.folder / "bin"), "/usr/bin", "/bin"]),
            "HOME": str(home),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def install(self, wheel: Path) -> None:
        """Install a wheel without its dependencies."""
        pip = (sys.executable, "-m", "pip", "--python", self.python)
        # The pins' folder knows this version as installed, in editable mode.
        options = (
            *("--no-deps", "--no-index", "--ignore-installed"),
            *("--quiet", "--disable-pip-version-check"),
        )
        run(*pip, "install", *options, wheel, cwd=self.folder)


def environment(folder: Path) -> Environment:
    """Make one. The tests' packages are on its path, but what they install editable is not."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    made = Environment(folder)
    (made.packages / "pins.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return made


def names_in(wheel: Path) -> set[str]:
    """Names of the files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())
