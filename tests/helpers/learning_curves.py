"""Curves of accuracy, for the tests of `bench learning`."""

from downpour.benchmarks.learning.curve import Curve, Look


def curve(*points: tuple[float, float]) -> Curve:
    looks = tuple(
        Look(examples=round(1000 * s), updates=round(s), epoch=s / 10, seconds=s, accuracy=a)
        for s, a in points
    )
    return Curve(startup_s=2, scoring_s=0, looks=looks, ended="arrived")


SLOW, FAST, NEVER = curve((4, 0.4), (8, 0.6)), curve((2, 0.4), (3, 0.6)), curve((9, 0.45))
