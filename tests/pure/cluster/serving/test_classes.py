"""Names of classes that contradict each other are refused, and those that agree or are not known
are not.
"""

import pytest

from downpour.cluster.errors import UserError
from downpour.cluster.serving.classes import check_same_classes

PETS = ("cat", "dog", "emu")


def test_the_same_names_and_no_names() -> None:
    check_same_classes([("a", PETS), ("b", list(PETS)), ("c", ()), ("d", PETS)])
    check_same_classes([("a", ()), ("b", PETS)])
    check_same_classes([])


@pytest.mark.parametrize(
    ("others", "words"),
    [
        (("0", "1", "2"), "a tells cat, dog, emu apart, and c 0, 1, 2: give"),
        (PETS[:2], "and c cat, dog: give"),
        (tuple("12345"), "and c 1, 2, 3, 4, … (5 classes): give"),
        (("cat", "emu", "dog"), "label 1 is 'dog' in a and 'emu' in c: the same classes in"),
    ],
)
def test_other_names(others: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_same_classes([("a", PETS), ("b", ()), ("c", others)])
    assert words in str(caught.value)
