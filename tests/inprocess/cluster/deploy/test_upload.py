"""What is said of an upload is what Ray packs; what a job needs and does not get is named."""

from __future__ import annotations

import dataclasses
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from downpour.cluster.config import recipes
from downpour.cluster.config.paths import PACKAGE
from downpour.cluster.config.run import RunConfig
from downpour.cluster.deploy import jobs, upload
from downpour.cluster.errors import UserError


def write(folder: Path, files: dict[str, int]) -> None:
    """Files of so many bytes."""
    for name, size in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with packages of its own, as the working directory."""
    folder = tmp_path / "project"
    write(
        folder,
        {
            "models/mine.py": 10,
            "models/__pycache__/mine.cpython-311.pyc": 99,
            "models/runs/kept.py": 1,  # only the runs at the top are left out
            "data/train.parquet": 5000,
            "data/scratch/old.bin": 70,
            "runs/a/model.safetensors": 999,
            ".venv/pyvenv.cfg": 1,
            "env/pyvenv.cfg": 1,
            "env/lib/torch.so": 10_000,
            ".git/HEAD": 5,
            "notes/todo.txt": 3,
        },
    )
    (folder / ".gitignore").write_text("notes/\n*.log\n")
    (folder / "data" / ".rayignore").write_text("scratch\n")
    monkeypatch.chdir(folder)
    return folder


def packed(folder: Path, target: Path, data: str | None = None) -> dict[str, int]:
    """What Ray's own packing puts into an archive, without empty folders."""
    from ray._private.runtime_env.packaging import create_package

    excludes = jobs.runtime_env(upload.measure(folder, data=data), folder)["excludes"]
    create_package(str(folder), target, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(target) as archive:
        return {i.filename: i.file_size for i in archive.infolist() if not i.is_dir()}


def test_the_upload_is_what_ray_packs(project: Path, tmp_path: Path) -> None:
    found = upload.measure(project)
    sizes = {str(path): size for path, size in found.sizes.items()}
    assert sizes == packed(project, tmp_path / "a.zip")
    assert set(sizes) == {
        *("models/mine.py", "models/runs/kept.py", "data/train.parquet"),
        *(".gitignore", "data/.rayignore"),
    }
    assert found.left_out == (".git/", ".venv/", "env/", "notes/", "runs/")
    assert found.line() == (
        f"uploading {project} (5 files, 0.0 MiB; not .git/, .venv/, env/, notes/, runs/) and "
        "downpour"
    )
    assert found.has(Path("data"))
    assert found.has(project / "models" / "mine.py")
    assert not found.has(Path("data/scratch"))
    assert not found.has(Path("/etc"))


def test_the_package_is_packed_whole_and_without_what_lies_beside_it(tmp_path: Path) -> None:
    sizes = packed(PACKAGE, tmp_path / "downpour.zip")
    assert "cluster/run/folder.py" in sizes
    assert "benchmarks/suite.py" in sizes
    assert "data/mnist-binary/manifest.json" in sizes
    assert {name.split("/")[1] for name in sizes if name.startswith("data/")} == {"mnist-binary"}
    assert not [name for name in sizes if name.startswith("benchmarks/results/")]


def test_an_upload_that_ray_would_refuse_names_the_large_folders(project: Path) -> None:
    write(
        project,
        {
            "data/images/train/a.parquet": 3 << 20,
            "data/images/train/b.parquet": 3 << 20,
            "checkpoints/one/a.bin": 1 << 20,
            "checkpoints/two/a.bin": 1 << 20,
            "big.bin": 1 << 19,
        },
    )
    found = upload.measure(project)
    upload.check_size(found)  # far below Ray's own limit
    said = re.escape("largest are data/images/train/ (6.0 MiB), checkpoints/ (2.0 MiB), big.bin")
    with pytest.raises(UserError, match=rf"8\.5 MiB to upload, .* less than 8\.0 MiB: .*{said}"):
        upload.check_size(found, 8 << 20)


def test_of_the_datasets_only_the_runs_own_is_sent(project: Path, tmp_path: Path) -> None:
    write(project, {"data/mine/a.parquet": 5, "data/ours*/b.parquet": 6, "data/ours/c.parquet": 7})
    for data, sent in (
        ("data/mine", {"data/mine/a.parquet"}),
        ("data/ours*", {"data/ours*/b.parquet"}),
        ("s3://bucket/data", set()),
        ("/mnt/data/mine", set()),
        ("data", {"data/mine/a.parquet", "data/ours*/b.parquet", "data/ours/c.parquet"}),
    ):
        found = upload.measure(project, data=data)
        sizes = {str(path): size for path, size in found.sizes.items()}
        assert sizes == packed(project, tmp_path / f"{len(sent)}{len(data)}.zip", data)
        assert sent == {name for name in sizes if name.startswith("data/") and "/" in name[5:]}
        assert ("data/" in found.left_out) == (not sent)
    assert "data/ours" in upload.measure(project, data="data/mine").left_out
    env = jobs.runtime_env(upload.measure(project, data="data/mine"), tmp_path)
    assert not any("mnist-binary" in pattern for pattern in env["excludes"]), "the package has it"


def test_what_the_dashboard_does_not_take_is_named_before_it_is_sent(project: Path) -> None:
    """It answers 413 beyond 100 MiB, far below what the store behind it takes."""
    with (project / "weights.bin").open("wb") as file:
        file.truncate(101 << 20)
    with pytest.raises(UserError, match=r"less than 100\.0 MiB: .* largest are weights\.bin \(101"):
        upload.check_size(upload.measure(project))
    (project / "weights.bin").unlink()
    large = dataclasses.replace(upload.measure(project), modules={Path("/x/mine"): 101 << 20})
    with pytest.raises(UserError, match=r"/x/mine has 101\.0 MiB to upload, .* 100\.0 MiB"):
        upload.check_size(large)


@pytest.mark.usefixtures("imported_here")
def test_own_modules_from_elsewhere_travel(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe on PYTHONPATH, with a package and a module that it imports."""
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, {"their_tools/__init__.py": 0, "their_tools/more.py": 0, "their_names.py": 0})
    other = tmp_path / "env" / "site-packages"  # of an environment below this one
    write(other, {"their_dependency/__init__.py": 0})
    monkeypatch.syspath_prepend(str(other))
    recipe = "import json, their_names, their_dependency\nfrom their_tools import more\n"
    (elsewhere / "their_recipe.py").write_text(recipe)
    monkeypatch.syspath_prepend(str(elsewhere))
    before = set(sys.modules)
    try:
        config = recipes.find("mnist-bn")
        name = "their_recipe:recipe"
        modules = upload.own_modules(project, name, config)
        found = {p for p in modules if p.is_relative_to(tmp_path)}
        wanted = {"their_recipe.py", "their_tools", "their_names.py"}
        assert found == {elsewhere / each for each in wanted}
        travels = upload.measure(project, data=config.data.data, modules=sorted(found))
        assert list(upload.missing(travels, name, config)) == []
        staging = tmp_path / "staging"
        staging.mkdir()
        sent = {Path(path) for path in jobs.runtime_env(travels, staging)["py_modules"]}
        assert all(path.is_dir() for path in sent), "Ray's job client takes no files"
        assert elsewhere / "their_tools" in sent
        text = (staging / "their_recipe" / "__init__.py").read_text()
        assert text == (elsewhere / "their_recipe.py").read_text()
        assert f"{elsewhere / 'their_tools'} (0.0 MiB)" in travels.line()
        assert not any("site-packages" in str(path) for path in modules)
        assert upload.own_modules(project, "mnist-bn", config) == []
    finally:
        for module in set(sys.modules) - before:
            del sys.modules[module]


def own(project: Path) -> RunConfig:
    model = dataclasses.replace(recipes.find("mnist-bn").model, model="models.mine:network")
    return dataclasses.replace(recipes.find("mnist-bn"), model=model)


@pytest.fixture
def imported_here(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the project are found, and none of another test's."""
    monkeypatch.syspath_prepend(str(project))
    for name in ("models", "models.mine", "runs", "runs.recipe"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("imported_here")
def test_what_a_recipe_needs_and_gets(project: Path) -> None:
    for recipe in ("mnist-bn", "models.mine:recipe"):
        assert list(upload.missing(upload.measure(project), recipe, own(project))) == []


@pytest.mark.usefixtures("imported_here")
def test_a_module_from_elsewhere_is_told_of(project: Path) -> None:
    (line,) = upload.missing(upload.measure(project), "json:recipe", own(project))
    assert re.fullmatch(r"json is .*json/__init__\.py, which is not sent: .* installed", line)


def data(config: RunConfig, folder: str) -> RunConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, data=folder))


@pytest.mark.usefixtures("imported_here")
@pytest.mark.parametrize(
    ("recipe", "change", "said"),
    [
        ("runs.recipe:mine", lambda c: c, r"runs\.recipe is .*runs/recipe\.py, which is not sent"),
        ("mnist-bn", lambda c: data(c, "data/scratch"), r"data is .*/data/scratch, which is not"),
    ],
)
def test_what_is_left_out_and_needed_is_refused(
    project: Path, recipe: str, change: Callable[[RunConfig], RunConfig], said: str
) -> None:
    (project / "runs" / "recipe.py").write_text("")
    with pytest.raises(UserError, match=said + r".*\.rayignore.*/runs"):
        list(upload.missing(upload.measure(project), recipe, change(own(project))))
