"""The largest stable rate against closed forms, and against torch's SGD on a parabola."""

import math
from collections import deque

import pytest
import torch

from downpour.benchmarks.delay import largest_stable, main, table
from downpour.paramserver.errors import BadConfiguration


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_without_delay_it_is_the_known_limit(momentum: float) -> None:
    assert largest_stable(0, momentum) == pytest.approx(2 * (1 + momentum))


@pytest.mark.parametrize("delay", [0, 1, 2, 10, 49, 1000])
def test_without_momentum_it_is_the_closed_form(delay: int) -> None:
    expected = 2 * math.sin(math.pi / (2 * (2 * delay + 1)))
    assert largest_stable(delay, 0.0) == pytest.approx(expected)


def parabola(delay: int, momentum: float, rate: float) -> float:
    """How far torch's SGD is from the lowest point of w*w/2 at the end, from 1 at the start."""
    weight = torch.ones(1, dtype=torch.float64)
    optimizer = torch.optim.SGD([weight], lr=rate, momentum=momentum)
    pulled = deque([weight.clone()] * (delay + 1), maxlen=delay + 1)
    farthest = 0.0
    for step in range(400 * (delay + 1)):
        weight.grad = pulled[0].clone()
        optimizer.step()
        pulled.append(weight.clone())
        if step >= 380 * (delay + 1):
            farthest = max(farthest, abs(float(weight)))
    return farthest


@pytest.mark.parametrize(("delay", "momentum"), [(0, 0.9), (1, 0.0), (1, 0.9), (4, 0.5)])
def test_torch_comes_to_rest_below_it_and_not_above(delay: int, momentum: float) -> None:
    limit = largest_stable(delay, momentum)
    assert parabola(delay, momentum, 0.9 * limit) < 0.1
    assert parabola(delay, momentum, 1.1 * limit) > 10


def test_numbers_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadConfiguration, match="delay is -1: give 0 or more"):
        largest_stable(-1, 0.9)
    with pytest.raises(BadConfiguration, match="momentum is 1"):
        largest_stable(1, 1.0)
    for words in (["--rate", "0"], ["--delays", "many"], ["--delays", "-1"], ["--momentum", "1"]):
        with pytest.raises(SystemExit):
            main(words)
        assert "give" in capsys.readouterr().err


def test_it_prints_a_line_for_each_delay(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--delays", "0,49"]) == 0
    shown = capsys.readouterr().out
    assert shown == table(0.1, 0.9, (0, 49)) + "\n"
    assert [line.split()[0] for line in shown.splitlines()[2:]] == ["0", "49"]
