"""Credentials in an address are refused, and are not repeated in the error."""

import dataclasses
import sys
from pathlib import Path

import pytest

from downpour.cluster.cli.main import main
from downpour.cluster.config.secrets import check_no_secrets
from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import RunFolder
from tests.helpers import tiny


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIAKEY:SECRET@bucket/data?region=eu",
        "s3://AKIAKEY:SEC/RET+x=@bucket",
        "--data=s3://AKIAKEY:SECRET@bucket",
        "hdfs://user:SECRET@host:9000/path",
        "https://user:SECRET@host/x",
    ],
)
def test_an_address_with_credentials_is_refused_without_showing_them(address: str) -> None:
    with pytest.raises(UserError) as caught:
        check_no_secrets(["train", address])
    message = str(caught.value)
    assert "AWS_SECRET_ACCESS_KEY" in message
    for secret in ("SECRET@", "AKIAKEY", "SEC/RET", "user"):
        assert secret not in message


@pytest.mark.parametrize(
    "text",
    [
        *("s3://bucket/a:b@c", "hdfs://host:9000/a@b", "hdfs://host:9000", "gs://bucket/x"),
        *("abfs://container@account.dfs.core.windows.net/x", "hdfs://user@host:9000/x"),
        *("/local/a:b@c", "me@host:/path", "s3://bucket?endpoint_override=localhost:9000"),
    ],
)
def test_other_addresses_are_not(text: str) -> None:
    check_no_secrets([text])


def test_a_run_with_credentials_leaves_no_folder(tmp_path: Path) -> None:
    config = tiny.config("s3://KEY:SECRET@bucket/data")
    with pytest.raises(UserError, match="credentials"):
        RunFolder.create(tmp_path / "a", config)
    config = tiny.config("nowhere")
    policy = dataclasses.replace(config.policy, checkpoints="s3://KEY:SECRET@bucket/data")
    with pytest.raises(UserError, match="credentials"):
        RunFolder.create(tmp_path / "a", dataclasses.replace(config, policy=policy))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "submit"])
def test_a_command_with_credentials_does_nothing(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["downpour", command, "mnist-bn", "--data", "s3://KEY:SECRET@bucket/data"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("downpour: error: s3://…@bucket/data has credentials in it")
    assert "SECRET@" not in told
