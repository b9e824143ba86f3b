"""A step leaves what autograd finds, recorded or not, to the bit."""

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from downpour.models.batchnorm import BatchNorm
from downpour.models.flat import FlatModel, layout_of
from downpour.models.layers import LinearBN
from downpour.workers.step import record_book
from downpour.workers.step.interpreter import CannotInterpret
from downpour.workers.step.joining import JoinTrial
from downpour.workers.step.model_copy import Mailbox, ModelCopy, StepContext, norm
from tests.helpers.close import assert_close
from tests.helpers.networks import NAMES, batches, build, mailboxes
from tests.helpers.unrepeatable import Scaled, unrepeatable


def make(module: nn.Module, **options: object) -> tuple[ModelCopy, StepContext, list[Mailbox]]:
    flat = FlatModel(module)
    initial = flat.weights.clone()
    context = StepContext(flat.layout, **options)  # type: ignore[arg-type]
    slot = ModelCopy(flat, context)
    slot.weights[:] = initial.numpy()
    return slot, context, mailboxes(flat.layout, 2)


def refuse(graph: fx.Graph) -> Callable[..., Tensor]:
    raise CannotInterpret(f"a graph of {len(graph.nodes)} nodes")


@pytest.mark.parametrize("by_python", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_step_is_the_eager_step_to_the_bit(
    name: str, by_python: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_python:
        monkeypatch.setattr("downpour.workers.step.recording.interpreted", refuse)
    eager, recorded = make(build(name), recorded=False), make(build(name), recorded=True)
    for i, (x, y) in enumerate(batches(name, (4, 4, 3, 4, 3, 3, 4))):
        for slot, _, _ in (eager, recorded):
            slot.weights *= 1.01
        found = []
        for slot, _, boxes in (eager, recorded):
            torch.manual_seed(i)
            found.append((slot.step(x, y, boxes[i % 2], 0), boxes[i % 2]))
        (a, box_a), (b, box_b) = found
        assert a == b
        assert torch.equal(box_a.gradient, box_b.gradient)
        assert torch.equal(box_a.moments[0], box_b.moments[0])
    made = [r for r in recorded[1].recordings.values() if r is not None]
    assert len(made) == 2, "a recording for each size of mini-batch"
    assert [r.by_python for r in made] == [by_python] * 2
    assert not eager[1].recordings


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", NAMES[:3])
def test_gradient_moments_and_loss_are_autograds(name: str, recorded: bool) -> None:
    slot, _, boxes = make(build(name), recorded=recorded)
    data = batches(name, (4,) * 6)
    for x, y in data[:3]:
        slot.step(x, y, boxes[1], 0)
    for i, (x, y) in enumerate(data[3:]):
        result = slot.step(x, y, boxes[0], i)
    oracle = FlatModel(build(name))
    total, loss = torch.zeros(oracle.layout.num_parameters), torch.tensor(0.0)
    for i, (x, y) in enumerate(data[3:]):
        oracle.zero_gradient()
        loss = functional.cross_entropy(oracle.module(x), y)
        loss.backward()
        assert oracle.gradient is not None
        total += oracle.gradient
        assert torch.equal(boxes[0].moments[i], oracle.moments)
    assert torch.equal(boxes[0].gradient, total[: oracle.layout.trained])
    assert not total[oracle.layout.trained :].any()
    assert result.loss == loss.item()
    assert result.gradient_norm == pytest.approx(total.norm().item())


def test_slots_share_a_recording_and_nothing_else() -> None:
    slot, context, boxes = make(build("mnist-bn"), recorded=True)
    other = ModelCopy(FlatModel(build("mnist-bn")), context)
    other.weights[:] = slot.weights * 2
    (x, y), *_ = batches("mnist-bn", (4,))
    eager, _, plain = make(build("mnist-bn"), recorded=False)
    first = eager.step(x, y, plain[0], 0)
    eager.weights *= 2
    second = eager.step(x, y, plain[1], 0)
    for _ in range(3):
        assert slot.step(x, y, boxes[0], 0) == first
        assert other.step(x, y, boxes[1], 0) == second
    assert torch.equal(boxes[0].gradient, plain[0].gradient)
    assert torch.equal(boxes[1].gradient, plain[1].gradient)
    assert len(context.recordings) == 1


@pytest.mark.parametrize("module", unrepeatable(), ids=type)
def test_what_cannot_be_recorded_goes_on_without(module: nn.Module) -> None:
    slot, context, boxes = make(module, recorded=True)
    for x, y in batches("mnist", (4,) * 5):
        slot.step(x, y, boxes[0], 0)
    assert set(context.recordings.values()) == {None}


class Rows(nn.Linear):
    """Takes rows by number: as many whatever the values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[torch.arange(len(x)).flip(0)]


def test_rows_that_are_taken_by_number_are_recorded() -> None:
    slot, context, boxes = make(Rows(6, 3), recorded=True)
    for x, y in batches("mnist", (4,) * 3):
        slot.step(x, y, boxes[0], 0)
    assert None not in context.recordings.values()


@pytest.mark.parametrize("changed_at", [2, 3, 7])
def test_a_recording_that_no_longer_does_what_the_step_does_is_given_up(
    changed_at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second step is recorded, so the third and each fifth from there are compared."""
    monkeypatch.setattr(record_book, "CHECK_EVERY", 5)
    module, plain = Scaled(6, 3), Scaled(6, 3)
    plain.load_state_dict(module.state_dict())
    slot, context, boxes = make(module, recorded=True)
    eager, _, others = make(plain, recorded=False)
    agree = []
    for i, (x, y) in enumerate(batches("mnist", (4,) * 14)):
        module.scale = plain.scale = 2.0 if i >= changed_at else 1.0
        found, expected = slot.step(x, y, boxes[0], 0), eager.step(x, y, others[0], 0)
        agree.append(found == expected and torch.equal(boxes[0].gradient, others[0].gradient))
    compared = next(i for i in (2, 7, 12) if i >= changed_at)
    assert agree == [not changed_at <= i < compared for i in range(14)]
    assert set(context.recordings.values()) == {None}
    assert f"{0 if compared == 2 else 4} were since the last comparison" in caplog.text


@pytest.mark.parametrize("recorded", [False, True])
def test_a_step_in_bfloat16_is_autocasts(recorded: bool) -> None:
    slot, context, boxes = make(build("mnist-bn"), recorded=recorded, precision="bfloat16")
    oracle, exact = FlatModel(build("mnist-bn")), FlatModel(build("mnist-bn"))
    for x, y in batches("mnist-bn", (8,) * 4):
        result = slot.step(x, y, boxes[0], 0)
        for flat, cast in ((oracle, True), (exact, False)):
            flat.zero_gradient()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
                outputs = flat.module(x)
                loss = functional.cross_entropy(outputs, y)
            assert (outputs.dtype == torch.bfloat16) == cast
            assert loss.dtype == torch.float32
            loss.backward()
            if cast:
                assert result.loss == loss.item()
        gradients = [oracle.gradient, exact.gradient]
        assert torch.equal(boxes[0].gradient, gradients[0])
        assert torch.equal(boxes[0].moments[0], oracle.moments)
        difference = torch.linalg.vector_norm(boxes[0].gradient - gradients[1])
        assert 0 < difference < 0.05 * torch.linalg.vector_norm(gradients[1])
        assert_close(boxes[0].moments[0], exact.moments, rtol=0.02, atol=0.02)
    assert (None in context.recordings.values()) is False
    assert bool(context.recordings) == recorded


def test_a_loss_that_is_not_finite_is_recorded_all_the_same() -> None:
    slot, context, boxes = make(build("mnist"), recorded=True)
    slot.weights[:] = float("nan")
    (x, y), *_ = batches("mnist", (4,))
    for _ in range(3):
        slot.step(x, y, boxes[0], 0)
    assert None not in context.recordings.values()


def test_recording_draws_no_random_numbers() -> None:
    slot, _, boxes = make(build("images"), recorded=True)
    data = batches("images", (4,) * 4)
    torch.manual_seed(5)
    random.seed(5)
    recorded = [slot.step(x, y, boxes[0], 0) for x, y in data]
    slot, _, boxes = make(build("images"), recorded=False)
    torch.manual_seed(5)
    assert recorded == [slot.step(x, y, boxes[0], 0) for x, y in data]


def interleave(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts, 1).flatten(0, 1)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", NAMES[:3])
def test_mini_batches_together_are_the_same_ones_one_after_the_other(
    name: str, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same weights: the gradients' sum to rounding, and each mini-batch's own moments."""
    monkeypatch.setattr(JoinTrial, "next", lambda _: True)
    flat = FlatModel(build(name))
    initial = flat.weights.clone()
    context = StepContext(flat.layout, recorded=recorded, depth=3)
    joint, boxes = ModelCopy(flat, context), mailboxes(flat.layout, 2)
    joint.weights[:] = initial.numpy()
    plain, _, (alone, *_) = make(build(name), recorded=False)
    data = batches(name, (4,) * 12)
    for start in range(0, 12, 3):
        group = data[start : start + 3]
        x, y = interleave([x for x, _ in group]), interleave([y for _, y in group])
        box = boxes[0]
        found = joint.step(x, y, box, 0, 3)
        expected = torch.zeros_like(box.gradient)
        losses = []
        for j, (inputs, targets) in enumerate(group):
            losses.append(plain.step(inputs, targets, alone, 0).loss)
            expected += alone.gradient
            assert_close(box.moments[j], alone.moments[0], rtol=1e-4, atol=1e-5)
        difference = torch.linalg.vector_norm(box.gradient - expected)
        assert difference <= 1e-3 * torch.linalg.vector_norm(expected)
        assert found.loss == pytest.approx(sum(losses) / 3, rel=1e-4)
        assert found.gradient_norm == pytest.approx(norm(box.gradient))
    assert context.joinable
    assert bool(context.recordings) == recorded


class Maps(nn.Module):
    """Feature maps in one order of memory or the other, with a layer that is used twice."""

    def __init__(self, memory_format: torch.memory_format) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.format = memory_format
        self.first, self.second = (
            nn.Conv2d(3, 5, 3, padding=1, bias=False),
            nn.Conv2d(5, 5, 3, padding=1, bias=False),
        )
        self.bn, self.last, self.out = BatchNorm(5), BatchNorm(5), nn.Linear(5, 3)
        self.last.bias = None
        self.last.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = x.contiguous(memory_format=self.format)
        y = self.bn(self.first(y)).relu()
        y = self.bn(self.second(y)).relu()
        scores: Tensor = self.out(self.last(y.mean((2, 3))))
        return scores


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_feature_maps_of_mini_batches_together_are_normalized_in_the_order_they_have(
    memory_format: torch.memory_format,
    precision: str,
    recorded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch's own layers over each mini-batch by itself are the oracle."""
    monkeypatch.setattr(JoinTrial, "next", lambda _: True)
    flat = FlatModel(Maps(memory_format))
    initial = flat.weights.clone()
    context = StepContext(flat.layout, recorded=recorded, depth=3, precision=precision)  # type: ignore[arg-type]
    joint, (box, _) = ModelCopy(flat, context), mailboxes(flat.layout, 2)
    joint.weights[:] = initial.numpy()
    plain, _, (alone, *_) = make(Maps(memory_format), recorded=False, precision=precision)
    generator = torch.Generator().manual_seed(1)
    # Rounded to bfloat16 here and there, in another order of sums.
    most, near = (1e-5, 1e-5) if precision == "float32" else (0.05, 0.02)
    for _ in range(4):
        x = torch.rand(12, 3, 6, 6, generator=generator)
        y = torch.randint(3, (12,), generator=generator)
        found, expected = joint.step(x, y, box, 0, 3), torch.zeros_like(box.gradient)
        losses = []
        for j in range(3):
            losses.append(plain.step(x[j::3].contiguous(), y[j::3].contiguous(), alone, 0).loss)
            expected += alone.gradient
            assert_close(box.moments[j], alone.moments[0], rtol=near, atol=near)
        difference = torch.linalg.vector_norm(box.gradient - expected)
        assert difference <= most * torch.linalg.vector_norm(expected)
        assert found.loss == pytest.approx(sum(losses) / 3, rel=near)
    assert context.joinable
    assert (None in context.recordings.values()) is False
    assert bool(context.recordings) == recorded


class Mixing(nn.Module):
    """Subtracts the mean over all rows that it sees, which no layer of ours does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build("mnist-bn")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y - y.mean()


def test_a_model_that_mixes_rows_is_not_joined(caplog: pytest.LogCaptureFixture) -> None:
    def squares(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs**2).mean()  # cross-entropy would not see the subtraction

    flat = FlatModel(Mixing())
    initial = flat.weights.clone()
    context = StepContext(flat.layout, loss=squares, recorded=False, depth=2)
    slot, boxes = ModelCopy(flat, context), mailboxes(flat.layout, 2)
    slot.weights[:] = initial.numpy()
    (x0, y0), (x1, y1) = batches("mnist-bn", (4, 4))
    slot.step(interleave([x0, x1]), interleave([y0, y1]), boxes[0], 0, 2)
    assert context.joinable is False
    assert "mixes the rows" in caplog.text
    slot.step(x0, y0, boxes[1], 0)
    slot.step(x1, y1, boxes[1], 1)
    assert_close(boxes[0].gradient, boxes[1].gradient)


class Checkpointed(nn.Module):
    """Computes a part of it again in the backward pass, by either kind of checkpointing."""

    def __init__(self, *, reentrant: bool, whole: bool) -> None:
        super().__init__()
        self.first, self.out = LinearBN(6, 5), nn.Linear(5, 3)
        self.reentrant, self.whole = reentrant, whole

    def forward(self, x: Tensor) -> Tensor:
        def part(x: Tensor) -> Tensor:
            y: Tensor = self.first(x)
            return self.out(y) if self.whole else y

        x = x.clone().requires_grad_()
        y: Tensor = checkpoint(part, x, use_reentrant=self.reentrant)
        return y if self.whole else self.out(y)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_step_is_the_same(reentrant: bool, whole: bool) -> None:
    torch.manual_seed(3)
    module = Checkpointed(reentrant=reentrant, whole=whole)
    theirs = copy.deepcopy(module)
    slot, _, (box, _) = make(module, recorded=False)
    for x, y in batches("mnist-bn", (4, 4)):
        result = slot.step(x, y, box, 0)
        theirs.zero_grad()
        loss = functional.cross_entropy(theirs(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        assert_close(torch.tensor(result.loss), loss.detach())
        entries = layout_of(theirs).entries
        wanted = [theirs.get_parameter(entry.name).grad for entry in entries]
        assert_close(box.gradient, torch.cat([g.flatten() for g in wanted if g is not None]))
        mean = theirs.get_submodule("first.bn").batch_mean
        assert_close(box.moments[0, 1], mean)  # type: ignore[arg-type]
