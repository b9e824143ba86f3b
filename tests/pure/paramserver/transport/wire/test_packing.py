"""Small numbers packed several to a byte, and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from downpour.paramserver.errors import MalformedMessage
from downpour.paramserver.transport.wire.packing import (
    WIDTHS,
    exceptional,
    largest,
    pack,
    packed_bytes,
    unpack,
)


@given(
    st.lists(st.integers(-1024, 1024) | st.integers(-9, 9), min_size=1, max_size=70),
    st.sampled_from(WIDTHS),
    st.booleans(),
)
def test_whatever_is_packed_comes_back(values: list[int], bits: int, small: bool) -> None:
    numbers = np.array(values, np.int16)
    if small:
        numbers = np.clip(numbers, -largest(bits), largest(bits))
    large = exceptional(numbers, bits)
    assert large.tolist() == [abs(int(n)) > largest(bits) for n in numbers]
    into = np.empty(packed_bytes(len(numbers), bits), np.uint8)
    exceptions = pack(numbers, large if large.any() else None, bits, into)
    assert exceptions.tolist() == numbers[large].tolist()
    assert unpack(into, bits, len(numbers), exceptions).tolist() == numbers.tolist()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("exceptions", [0, 1, 3])
def test_exceptions_have_to_have_their_places(bits: int, exceptions: int) -> None:
    numbers = np.array([1000, 0, 1, -1000, 0], np.int16)
    into = np.empty(packed_bytes(5, bits), np.uint8)
    pack(numbers, exceptional(numbers, bits), bits, into)
    with pytest.raises(MalformedMessage, match="exceptions"):
        unpack(into, bits, 5, np.ones(exceptions, np.int16))
