"""How much staleness a rate bears: the largest rate at which momentum SGD is stable.

    python -m downpour.benchmarks.delay [--rate 0.1] [--momentum 0.9] [--delays 0,1,5,10,49]

prints, for each delay, how steep a loss may be at most. Nothing is measured: it is a calculation.

On a loss of curvature h along one direction, with a gradient that is d updates old:

    v <- momentum * v + h * w_(t-d);    w_(t+1) = w_t - rate * v

Its solutions are powers of the roots z of

    (z - 1) * (z - momentum) * z^(d-1) + rate * h = 0

so it is stable while all |z| < 1. The first root to leave the unit circle does so at z = e^(i*a)
where the phase of the first term is pi:

    (pi + a) / 2 + arg(e^(i*a) - momentum) + (d - 1) * a = pi

and its modulus is the largest rate * h there is. Without momentum a = pi / (2d + 1), and the limit
is 2 * sin(a / 2): about pi / (2d + 1) for large d (Yang et al. 2020, "PipeMare", Lemma 1; Giladi et
al. 2019, "At stability's edge"). Momentum multiplies the way of each gradient by
1 / (1 - momentum), and its delay adds to d.
"""

from __future__ import annotations

import argparse
import cmath
import math
import sys
from collections.abc import Sequence

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.rules.update import check_fraction

HALVINGS = 60
"""Of the interval in which the phase is looked for: to the last bit of a float."""


def largest_stable(delay: int, momentum: float) -> float:
    """Return the least rate * curvature at which momentum SGD does not come to rest.

    Args:
        delay: Updates between a gradient's weights and those that it is applied to, from 0 on.
        momentum: As torch has it, in [0, 1).

    Raises:
        BadConfiguration: One of them is out of its range.
    """
    if delay < 0:
        raise BadConfiguration(f"delay is {delay}: give 0 or more")
    check_fraction("momentum", momentum)
    low, high = 0.0, math.pi
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        phase = (math.pi + middle) / 2 + (delay - 1) * middle
        phase += cmath.phase(cmath.exp(1j * middle) - momentum)
        if phase < math.pi:
            low = middle
        else:
            high = middle
    root = cmath.exp(1j * high)
    return abs((root - 1) * (root - momentum))


def table(rate: float, momentum: float, delays: Sequence[int]) -> str:
    """Return a line for each delay: the limit of rate * curvature, and of the curvature."""
    lines = [f"rate {rate:g}, momentum {momentum:g}", "delay  rate x curvature  curvature"]
    for delay in delays:
        limit = largest_stable(delay, momentum)
        lines.append(f"{delay:5d}  {limit:16.4g}  {limit / rate:9.3g}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m downpour.benchmarks.delay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--delays", default="0,1,5,10,49", help="updates, such as 0,49")
    given = parser.parse_args(arguments)
    if not 0 < given.rate < math.inf:
        parser.error(f"rate is {given.rate}: give a finite number above 0")
    try:
        delays = [int(word) for word in given.delays.split(",")]
    except ValueError:
        parser.error(f"delays is {given.delays!r}: give whole numbers, such as 0,49")
    try:
        print(table(given.rate, given.momentum, delays))
    except BadConfiguration as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
