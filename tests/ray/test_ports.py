"""A run that starts its own Ray: its ports are on loopback and refuse; its secrets are kept."""

import os
from collections import Counter

import pytest

from tests.helpers import commands
from tests.helpers.small_run import OwnRay
from tests.helpers.strangers import beyond_loopback, kind_of_refusal, listening

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


def test_every_port_of_a_run_is_on_loopback_and_refuses(on_its_own_ray: OwnRay) -> None:
    found = on_its_own_ray
    processes = commands.descendants(found.process.pid)
    ports = listening({found.process.pid, *processes})
    assert {at for at in ports if beyond_loopback(at[0])} == set()
    kinds = Counter(kind_of_refusal("127.0.0.1", port) for _, port in ports)
    assert kinds["ours"] == 2  # a port of each partition
    assert kinds["grpc"] > 5
    assert kinds["http"] > 2

    token = (found.home / ".ray" / "auth_token").read_text().strip()
    files = [f for place in (found.run, found.ray) for f in place.rglob("*") if f.is_file()]
    texts = {str(f): f.read_bytes() for f in [*files, found.log] if os.access(f, os.R_OK)}
    texts |= {f"arguments of {pid}": line.encode() for pid, line in processes.items()}
    for secret in (token, "PRIVATE KEY"):
        assert [place for place, text in texts.items() if secret.encode() in text] == []
