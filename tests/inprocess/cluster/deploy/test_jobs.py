"""What `downpour submit` refuses before anything is uploaded."""

from __future__ import annotations

import pytest

from downpour.cluster.cli.commands import downpour
from downpour.cluster.errors import run_cli


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no command: give one of"),
        (("evaluate", "a"), "'evaluate' is no command for a cluster"),
        (("train", "mnist-bn"), "--runs is runs, which would be in the job's own folder"),
        (("resume", "runs/a"), "RUN is runs/a, which would be"),
        (("train", "mnist-bx", "--runs", "/x"), "did you mean mnist-bn"),
        (("train", "mnist-bn", "--runs", "/x", "--replicas", "0"), "replicas is 0"),
        (("train", "mnist-bn", "--runs", "/x", "--replicaz", "3"), "No such option"),
        (("--follow",), "--follow needs --id"),
    ],
)
def test_a_mistake_is_refused_here(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(downpour, ["submit", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert line.startswith("downpour: error: ")
