"""Importing what others wrote, and whose code an error came from."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from downpour.models import lookup

BROKEN = """
import torch
if not hasattr(torch.ops.torchvision, "{operator}"):
    raise RuntimeError("operator torchvision::{operator} does not exist")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module's file that is on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / f"wants_operators_{tmp_path.name}.py"
    yield path
    sys.modules.pop(path.stem, None)


def test_an_operator_that_torchvision_lacks_is_declared(module: Path) -> None:
    module.write_text(BROKEN.format(operator="nms"))
    lookup.import_named(module.stem)
    with pytest.raises(NotImplementedError, match="torchvision::nms"):
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)


def test_any_other_failure_stays_what_it_is(module: Path) -> None:
    module.write_text(BROKEN.format(operator="unheard_of"))
    with pytest.raises(RuntimeError, match="torchvision::unheard_of does not exist"):
        lookup.import_named(module.stem)


def test_the_place_of_an_error_is_the_users(module: Path) -> None:
    module.write_text("import json\n\ndef read():\n    return json.loads('{')\n")
    read = lookup.import_named(module.stem).read
    with pytest.raises(ValueError, match="property name") as caught:
        read()
    assert lookup.place_of(caught.value) == f"{module}:4"


@pytest.mark.parametrize(
    ("file", "users"),
    [
        (torch.__file__, False),
        (lookup.__file__, False),
        (__file__, True),
        ("<string>", False),
        (str(Path(pytest.__file__).parents[1] / "theirs.py"), False),
    ],
)
def test_whose_a_source_is(file: str, *, users: bool) -> None:
    assert lookup.is_users(file) is users
