"""A link is measured by what comes over it, and decides the wire."""

import pytest

from downpour.paramserver.messages import WireDtype
from downpour.paramserver.transport.network.link_speed import measure, wire_for
from tests.helpers.networked import Networked
from tests.helpers.served_partitions import DEADLINE_S, KEY, P, by_deadline, has_connections


@pytest.mark.parametrize(
    ("mb_per_s", "wire"),
    [
        (2.0, WireDtype.INT4),  # a wide area
        (117.0, WireDtype.INT4),  # 1 Gbit/s
        (290.0, WireDtype.INT8),  # 2.5 Gbit/s
        (1170.0, WireDtype.FLOAT32),  # 10 Gbit/s
    ],
)
def test_the_slower_the_link_the_fewer_the_bits(mb_per_s: float, wire: WireDtype) -> None:
    assert wire_for(mb_per_s) is wire


def test_a_measurement_times_pulls_and_leaves_nothing_behind(one: Networked, driven: str) -> None:
    ticks = iter(range(100))
    found = measure(
        one.endpoints[0],
        key=KEY,
        credentials=one.keys.clients if one.keys else None,
        deadline_s=DEADLINE_S,
        clock=lambda: next(ticks) * 0.5,
    )
    assert found == pytest.approx(4 * P / 0.5 / 1e6)
    by_deadline(lambda: has_connections(one.servers[0], 0))
