"""Published networks, unchanged: built, trained, scored, predicted with and exported.

The oracle is the network itself, its batch normalization not folded, and onnxruntime.
"""

from pathlib import Path

import pytest

from tests.helpers import library_nets

TOLERANCE = {"predicted": 1e-4, "onnx": 1e-4, "folded": 5e-4}
"""Folding rounds each weight once more; a deep network of a few steps magnifies that."""


@pytest.fixture(autouse=True)
def _libraries() -> None:
    library_nets.skip_without_libraries()


@pytest.mark.parametrize(
    ("net", "export"),
    [(library_nets.RESNET, True), (library_nets.MOBILENET, False)],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_published_network_goes_all_the_way(
    net: library_nets.LibraryNet, tmp_path: Path, *, export: bool
) -> None:
    check(library_nets.put_through(net, tmp_path, export=export))


@pytest.mark.soak
@pytest.mark.parametrize("net", library_nets.ALL, ids=lambda net: f"{net.library}-{net.name}")
def test_each_published_network_goes_all_the_way(
    net: library_nets.LibraryNet, tmp_path: Path
) -> None:
    check(library_nets.put_through(net, tmp_path))


def check(differences: dict[str, float]) -> None:
    assert all(value <= TOLERANCE[name] for name, value in differences.items()), differences
