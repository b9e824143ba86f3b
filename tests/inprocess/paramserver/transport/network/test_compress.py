"""Gradients in 16 bits: what is applied lags behind by one residual."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from downpour.paramserver.messages import WireDtype
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.transport.network.compress import (
    Decoder,
    Encoder,
    ErrorFeedback,
    encoder,
    room_for,
    wire_dtype,
)
from downpour.paramserver.transport.network.frames import as_bytes
from tests.helpers.served_partitions import a_push

torch.set_num_threads(1)


(PARTITION,) = split(num_parameters=64, num_features=3, num_decayed=0, num_partitions=1)


def sent(encoding: Encoder, mailbox: int, dtype: torch.dtype) -> torch.Tensor:
    data = b"".join(encoding.slices(a_push(1, mailbox)))
    return torch.frombuffer(bytearray(data), dtype=dtype).float()


@given(
    st.sampled_from([WireDtype.BFLOAT16, WireDtype.FLOAT16]),
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=30),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_what_is_applied_lags_by_one_residual(
    wire: WireDtype, pushes: list[tuple[int, bool]], seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    boxes = [torch.zeros(40) for _ in range(3)]
    encoding = encoder(boxes, wire, 0)
    assert isinstance(encoding, ErrorFeedback)
    dtype = torch.bfloat16 if wire is WireDtype.BFLOAT16 else torch.float16
    true, applied = torch.zeros(40, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    for mailbox, is_applied in pushes:
        boxes[mailbox].copy_(scale * torch.randn(40, generator=generator))
        rounded = sent(encoding, mailbox, dtype)
        if is_applied:
            true += boxes[mailbox].double()
            applied += rounded.double()
        else:
            encoding.restore(mailbox)
    bound = 1e-5 * scale * len(pushes)  # float32's own rounding
    assert (applied + encoding.residual.double() - true).abs().max() <= bound
    # A rounding error at the most: of the largest bfloat16 here, or of a half's smallest step.
    assert encoding.residual.abs().max() <= max(0.05 * scale, 6e-8) * len(pushes)


def test_beyond_the_largest_half_the_rest_goes_later() -> None:
    encoding = ErrorFeedback([torch.tensor([1e5, -1e5])], WireDtype.FLOAT16)
    first = sent(encoding, 0, torch.float16)
    assert first.tolist() == [65504.0, -65504.0]
    encoding._gradients[0].zero_()
    second = sent(encoding, 0, torch.float16)
    assert (first + second + encoding.residual).tolist() == [1e5, -1e5]


def test_a_gradient_that_is_not_finite_leaves_no_residual() -> None:
    encoding = ErrorFeedback([torch.tensor([torch.nan, torch.inf])], WireDtype.BFLOAT16)
    data = b"".join(encoding.slices(a_push(1, gradient_norm=float("nan"))))
    assert not torch.frombuffer(bytearray(data), dtype=torch.bfloat16).isfinite().any()
    encoding.restore(0)
    assert encoding.residual.tolist() == [0.0, 0.0]


def test_float32_is_sent_from_where_it_is() -> None:
    box = torch.arange(4.0)
    (view,) = encoder([box], wire_dtype("float32"), 0).slices(a_push(1))
    box.fill_(7)
    assert torch.frombuffer(bytearray(view), dtype=torch.float32).tolist() == [7.0] * 4


def test_a_decoder_reads_whatever_wire_a_gradient_came_by() -> None:
    """One for a partition: a follower gets what several processes have sent, each in its way."""
    gradient = torch.randn(600, generator=torch.Generator().manual_seed(0))
    decoder = Decoder(600)
    for wire in [*WireDtype, WireDtype.INT8]:
        (data,) = encoder([gradient], wire, 0).slices(a_push(1))
        came = room_for(wire, 600)
        as_bytes(came)[:] = data
        found = decoder.gradient(came, wire)
        assert (found is came) == (wire is WireDtype.FLOAT32)
        step = {WireDtype.FLOAT32: 0.0, WireDtype.INT8: 1 / 125, WireDtype.INT4: 1 / 6.9}
        error = (found - gradient).abs().max() / gradient.abs().max()
        assert error <= step.get(wire, 1 / 256)
