"""Published networks, unchanged: built, trained, scored, predicted with and exported.

The oracle is the network itself, its batch normalization not folded, and onnxruntime. All networks,
by the real commands, are in `tests/ray/test_published_nets.py`.
"""

from pathlib import Path

import pytest

from tests.helpers import library_nets


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


def check(differences: dict[str, float]) -> None:
    """All are within 1e-4, or within a few times what float32 costs the network itself."""
    assert differences["allowed"] < 1e-3, differences
    assert all(value <= differences["allowed"] for value in differences.values()), differences
