"""What a user can get wrong is one line that names the value and the remedy, with exit status 2."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from downpour.cluster.cli.commands import downpour
from downpour.cluster.config import recipes
from downpour.cluster.errors import run_cli
from downpour.cluster.run.folder import RunFolder

ROOT = Path(__file__).resolve().parents[4]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def digit(size: int = 28) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (size, size), 255).save(buffer, "PNG")
    return buffer.getvalue()


def write_split(
    folder: Path,
    split: str,
    *,
    image: bytes | None = None,
    label: int = 3,
    columns: tuple[str, ...] = ("image", "label"),
    num_rows: int = 40,
) -> None:
    folder.mkdir(exist_ok=True)
    images = pa.array([{"bytes": image or digit(), "path": "x.png"}] * num_rows, IMAGE)
    table = pa.table({"image": images, "label": pa.array([label] * num_rows, pa.int64())})
    pq.write_table(table.select(columns), folder / f"{split}-00000-of-00001.parquet")


def dataset(folder: Path, **train: object) -> Path:
    write_split(folder, "train", **train)  # type: ignore[arg-type]
    write_split(folder, "test")
    return folder


def failure(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The line that a command that must fail prints."""
    status = run_cli(downpour, [str(a) for a in arguments])
    captured = capsys.readouterr()
    assert status == 2, captured
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("downpour: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "mnist-nb"], ["no recipe 'mnist-nb'", "did you mean mnist-bn?"]),
        (["train", "mnist-bn", "--replica", "3"], ["'--replica'", "'--replicas'"]),
        (["train", "mnist-bn", "--replicas", "0"], ["--replicas 0", "give at least 1"]),
        (["train", "mnist-bn", "--replicas", "ten"], ["'ten'", "'--replicas'"]),
        (["train", "mnist-bn", "--rule", "lion"], ["'lion'", "adagrad"]),
        (
            ["train", "mnist-bn", "--epochs", "9999", "--past-bound", "error"],
            ["epochs=9999", "rekey"],
        ),
        (["train", "mnist-bn", "--data", "/no/such/folder"], ["/no/such/folder"]),
        (["train", "mnist-bn", "--eval-split", "dev"], ["'dev'", "train"]),
        (["trian"], ["'trian'", "'train'"]),
        (["resume", "/no/such/run"], ["/no/such/run", "config.json"]),
        (["evaluate", "/no/such/run"], ["/no/such/run"]),
        (["status", "/no/such/run"], ["/no/such/run"]),
        (["ingest", "/no/such/source", "/tmp/never"], ["/no/such/source"]),
        (["bench", "peer"], ["'peer'", "'peers'"]),
        (["bench", "peers", "--repeat", "0"], ["repeat is 0", "give at least 1"]),
        (["bench", "peers", "--only", "mpi"], ["'mpi'", "rpc, ddp"]),
        (["bench", "all", "--only", "ddp"], ["--only ddp", "name one"]),
    ],
)
def test_words_that_are_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    if arguments[0] == "train":
        arguments = [*arguments, "--runs", str(tmp_path)]
    line = failure(capsys, *arguments)
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == []


def train(capsys: pytest.CaptureFixture[str], data: Path, *more: str | Path) -> str:
    runs = data.parent / "runs"
    line = failure(capsys, "train", "mnist-bn", "--data", data, "--runs", runs, *more)
    assert not runs.exists()
    return line


def test_a_folder_without_shards(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert str(tmp_path / "data") in train(capsys, tmp_path / "data")


def test_a_shard_that_is_not_parquet(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = dataset(tmp_path / "data")
    (data / "train-00000-of-00001.parquet").write_bytes(b"PAR1 but not really")
    line = train(capsys, data)
    assert "train-00000-of-00001.parquet" in line
    assert "Parquet" in line


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_shard_that_lacks_a_column(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, column: str
) -> None:
    kept = ({"image", "label"} - {column}).pop()
    data = dataset(tmp_path / "data", columns=(kept,))
    line = train(capsys, data)
    assert column in line
    assert "train-00000-of-00001.parquet" in line


def test_an_image_that_does_not_decode(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = train(capsys, dataset(tmp_path / "data", image=b"not an image"))
    assert "row 0" in line
    assert "x.png" in line


def test_an_image_of_another_size(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = train(capsys, dataset(tmp_path / "data", image=digit(32)))
    assert "32x32" in line
    assert "28x28" in line


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_out_of_range(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, label: int
) -> None:
    line = train(capsys, dataset(tmp_path / "data", label=label), "--num-classes", "10")
    assert str(label) in line
    assert "row 0" in line


def test_fewer_rows_than_a_mini_batch(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = train(capsys, dataset(tmp_path / "data", num_rows=20))
    assert "20" in line
    assert "32" in line


def test_a_run_folder_of_another_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "a", recipes.find("mnist"))
    line = failure(capsys, "train", "mnist-bn", "--runs", tmp_path, "--name", "a")
    assert "recipe mnist, not of mnist-bn" in line
    assert "downpour resume" in line


def test_a_run_folder_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    line = failure(capsys, "train", "mnist-bn", "--runs", tmp_path / "file")
    assert str(tmp_path / "file") in line
    assert "--runs" in line


def test_a_run_without_weights_yet(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "a", recipes.find("mnist"))
    assert "model.safetensors does not exist" in failure(capsys, "evaluate", tmp_path / "a")


def test_packages_of_ones_own_with_the_names_of_ours_are_never_imported(tmp_path: Path) -> None:
    for name in ("models", "workers", "cluster", "paramserver", "shuffler", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')")
    for first in (["-m", "downpour"], ["-c", "from downpour.cluster.cli.main import main; main()"]):
        done = subprocess.run(
            [sys.executable, *first, "recipes"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done
        assert "mnist-bn" in done.stdout


def test_status_and_recipes_without_any_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_cli(downpour, ["status", "--runs", str(tmp_path / "none")]) == 0
    assert "downpour train mnist-bn" in capsys.readouterr().out
    assert run_cli(downpour, ["recipes"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in recipes.RECIPES)


def test_a_run_that_nobody_holds_has_died(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = RunFolder.create(tmp_path / "a", recipes.find("mnist"))
    folder.write_json("status.json", {"state": "training", "updates": 12})
    folder.append_metrics({"updates": 12, "accuracy": 0.5})
    assert run_cli(downpour, ["status", str(folder.path), "--json"]) == 0
    assert '"state": "died' in capsys.readouterr().out
    with folder.locked():
        assert run_cli(downpour, ["status", str(folder.path), "--json"]) == 0
        shown = capsys.readouterr().out
        assert '"state": "training"' in shown
        assert '"accuracy": 0.5' in shown
        assert run_cli(downpour, ["status", "--runs", str(tmp_path)]) == 0
    assert "50.00%" in capsys.readouterr().out


def test_commands_that_compute_nothing_import_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'matplotlib'}"
    code = f"import downpour.cluster.cli.commands, sys; print(*({heavy} & sys.modules.keys()))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []
