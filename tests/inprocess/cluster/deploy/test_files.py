"""The cluster files that an installation writes for its user."""

from __future__ import annotations

from pathlib import Path

import pytest

from downpour.cluster.cli.commands import downpour
from downpour.cluster.config.paths import PACKAGE
from downpour.cluster.deploy.files import cluster_files, write_cluster_files
from downpour.cluster.errors import UserError, run_cli

TO_FILL_IN = {"providers/gcp.yaml": ["provider.project_id: put your project's id here"]}


@pytest.fixture(autouse=True)
def a_home_with_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def test_what_is_written_has_no_problems_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my cluster"
    assert run_cli(downpour, ["cluster-files", str(folder)]) == 0
    assert f"cd '{folder}' && downpour check ray_cluster.yaml" in capsys.readouterr().out
    written = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert written == set(cluster_files())
    monkeypatch.chdir(folder)
    for name in sorted(n for n in written if n.endswith(".yaml") and n != "alerts.yaml"):
        wrong = TO_FILL_IN.get(name, [])
        status = run_cli(downpour, ["check", name])
        said = capsys.readouterr().out.splitlines()
        assert said == ([f"{name}: {line}" for line in wrong] or [f"{name}: nothing to change"])
        assert status == (2 if wrong else 0)
    for path in folder.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "cluster/deploy" not in text, f"{path} names a path that is not here"
            assert "cluster/monitoring" not in text, f"{path} names a path that is not here"


def test_every_cluster_file_of_the_package_is_among_them() -> None:
    kept = {p.resolve() for p in (PACKAGE / "cluster" / "deploy").rglob("*") if p.is_file()}
    code = {p for p in kept if p.suffix in (".py", ".pyc")}
    assert kept - code <= {p.resolve() for p in cluster_files().values()}


def test_a_file_that_the_user_has_changed_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write_cluster_files(folder)
    write_cluster_files(folder)  # the same again is no change
    changed = folder / "providers" / "onprem.yaml"
    changed.write_text("cluster_name: mine\n")
    (folder / "requirements.lock").unlink()
    with pytest.raises(UserError, match=r"onprem\.yaml exists and differs: give another folder"):
        write_cluster_files(folder)
    assert changed.read_text() == "cluster_name: mine\n"
    assert not (folder / "requirements.lock").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot take the cluster files"):
        write_cluster_files(tmp_path / "file")
