"""Which tensor is the answer, and what auxiliary classifiers add to the loss."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from downpour.models.outputs import MainOutput, OutputsError, cross_entropy, heads, main_output
from tests.helpers.close import assert_close

MAIN, FIRST, SECOND = (
    torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in b"012"
)
TARGETS = torch.tensor([0, 2, 1, 1, 0])
Three = namedtuple("Three", "logits aux_logits2 aux_logits1")


@dataclass
class Answer:
    hidden: Tensor
    logits: Tensor


CASES = [
    (MAIN, 0),
    ((MAIN, FIRST), 1),
    (Three(MAIN, None, None), 0),
    (Three(MAIN, FIRST, SECOND), 2),
    ([MAIN, MAIN.mean(1)], 0),
    ({"out": MAIN, "aux": FIRST}, 1),
    ({"features": torch.zeros(5, 8), "logits": MAIN}, 0),
    ({"anything": MAIN, "loss": None}, 0),
    (Answer(hidden=torch.zeros(5, 8), logits=MAIN), 0),
    (((MAIN, torch.zeros(5, 8)), FIRST), 1),
    (({"logits": MAIN, "aux": FIRST}, torch.zeros(5, 8)), 1),
]


@pytest.mark.parametrize(("outputs", "auxiliary"), CASES)
def test_the_answer_and_its_auxiliaries(outputs: object, auxiliary: int) -> None:
    main, others = heads(outputs)
    assert main is MAIN
    assert len(others) == auxiliary
    expected = functional.cross_entropy(MAIN, TARGETS)
    if auxiliary == 1:
        expected = expected + 0.4 * functional.cross_entropy(FIRST, TARGETS)
    if auxiliary == 2:
        expected = expected + 0.3 * (
            functional.cross_entropy(FIRST, TARGETS) + functional.cross_entropy(SECOND, TARGETS)
        )
    assert_close(cross_entropy(outputs, TARGETS), expected)


@pytest.mark.parametrize("outputs", [{"a": MAIN, "b": FIRST}, {}, (), None, "logits"])
def test_what_has_no_answer_says_what_it_is(outputs: object) -> None:
    with pytest.raises(OutputsError, match="the network gives"):
        main_output(outputs)


def test_a_network_that_gives_its_answer_alone() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, -x

    assert MainOutput(Pair())(MAIN) is MAIN
