"""On a GPU: steps find what PyTorch finds there. Without one they are skipped, and say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from downpour.benchmarks.on_gpu.without_ray import KEPT, Here, Server, SyntheticReplicas, Workers
from downpour.models.flat import FlatModel
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.update import Momentum
from downpour.shuffler.images.decode import Decoder
from downpour.shuffler.images.specs import ImageSpec
from downpour.workers.spec import DeviceName, ModelSpec, Precision, ReplicasSpec, StepConfig
from downpour.workers.step.captured import alike
from downpour.workers.step.device import CudaDevice, cuda_problem
from downpour.workers.step.device_context import DeviceStepContext
from downpour.workers.step.device_model_copy import DeviceModelCopy
from downpour.workers.step.model_copy import Mailbox
from tests.helpers.device_story import on, oracle, same
from tests.helpers.networks import NAMES, batches, build, mailboxes


@pytest.fixture
def cuda() -> CudaDevice:
    if (problem := cuda_problem()) is not None:
        pytest.skip(f"needs a GPU: {problem}")
    return CudaDevice()


def make(
    name: str, device: CudaDevice, **options: Any
) -> tuple[DeviceModelCopy, DeviceStepContext, list[Mailbox]]:
    flat = FlatModel(build(name))
    initial = flat.weights.clone()
    context = DeviceStepContext(flat.layout, device, **options)
    slot = DeviceModelCopy(flat, context)
    slot.weights[:] = initial.numpy()
    return slot, context, mailboxes(flat.layout, 1)


def autograds(name: str, x: Tensor, y: Tensor, precision: Precision) -> tuple[Tensor, ...]:
    """Loss, gradient and moments as PyTorch's autograd and autocast find them on the GPU."""
    flat = FlatModel(build(name).to("cuda"))
    dtype = torch.float32 if precision == "float32" else getattr(torch, precision)
    with torch.autocast("cuda", dtype=dtype, enabled=precision != "float32"):
        loss = functional.cross_entropy(flat.module.train()(x.cuda()), y.cuda())
    scale = 1024.0 if precision == "float16" else 1.0
    (loss * scale).backward()
    assert flat.gradient is not None
    gradient = flat.gradient[: flat.layout.trained] / scale
    return loss.detach().reshape(1).cpu(), gradient.cpu(), flat.moments[None].cpu()


def outcome(result: Any, box: Mailbox) -> tuple[Tensor, ...]:
    found = result.wait()
    return torch.tensor([found.loss]), box.gradient.clone(), box.moments[:1].clone()


@pytest.mark.gpu
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("name", NAMES[:3])
def test_steps_are_those_of_processors_but_for_rounding(
    cuda: CudaDevice, name: str, direct: bool, recorded: bool
) -> None:
    found = on(cuda, name, direct=direct, recorded=recorded)
    for a, b in zip(found, oracle(name), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_it_does_not_matter_how_far_ahead_steps_are_begun(cuda: CudaDevice, name: str) -> None:
    torch.backends.cudnn.deterministic = True
    try:
        cuda.seed(3)
        one_by_one = on(cuda, name, ahead=0)
        cuda.seed(3)
        assert same(on(cuda, name, ahead=1), one_by_one)
    finally:
        torch.backends.cudnn.deterministic = False


@pytest.mark.gpu
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_step_is_autograds_under_autocast(
    cuda: CudaDevice, precision: Precision, recorded: bool
) -> None:
    slot, context, (box,) = make("mnist-bn", cuda, precision=precision, recorded=recorded)
    for x, y in batches("mnist-bn", (32,) * 4):
        found = outcome(slot.step(x, y, box, 0), box)
        expected = autograds("mnist-bn", x, y, precision)
        assert alike(expected, found, precision)  # type: ignore[arg-type]
        assert box.moments.dtype == box.gradient.dtype == torch.float32
        exact = autograds("mnist-bn", x, y, "float32")
        assert torch.equal(found[2][:, 0], exact[2][:, 0]), "counts"
        torch.testing.assert_close(found[2], exact[2], rtol=0.03, atol=0.03)
    assert bool(context.book.recordings) == recorded
    assert None not in context.book.recordings.values(), "captured"


@pytest.mark.gpu
def test_a_captured_step_with_dropout_is_the_step(cuda: CudaDevice) -> None:
    found: list[list[tuple[Tensor, ...]]] = []
    for recorded in (False, True):
        slot, context, (box,) = make("images", cuda, recorded=recorded)
        cuda.seed(3)
        data = batches("images", (16,) * 6)
        found.append([outcome(slot.step(x, y, box, 0), box) for x, y in data])
    assert context.book.recordings
    assert None not in context.book.recordings.values(), "captured"
    for expected, by_graph in zip(*found, strict=True):
        assert alike(expected, by_graph, "float32")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", NAMES[:3])
def test_mini_batches_together_are_the_sum_of_them(
    cuda: CudaDevice, name: str, recorded: bool
) -> None:
    slot, context, (box,) = make(name, cuda, recorded=recorded, depth=3)
    for i in range(4):
        parts = batches(name, (8,) * 12)[3 * i : 3 * i + 3]
        x, y = (torch.stack(list(p), 1).flatten(0, 1) for p in zip(*parts, strict=True))
        result = slot.step(x, y, box, 0, 3).wait()
        singles = [autograds(name, *part, "float32") for part in parts]
        gradient = torch.stack([s[1] for s in singles]).sum(0)
        torch.testing.assert_close(box.gradient, gradient, rtol=1e-3, atol=1e-5)
        moments = torch.cat([s[2] for s in singles])
        torch.testing.assert_close(box.moments, moments, rtol=1e-4, atol=1e-5)
        losses = sum(float(s[0]) for s in singles) / 3
        assert result.loss == pytest.approx(losses, rel=1e-4)
    assert context.joinable
    assert None not in context.book.recordings.values()


@pytest.mark.gpu
def test_copies_are_from_and_to_page_locked_memory(cuda: CudaDevice) -> None:
    from downpour.paramserver.transport.shared.mailboxes import Mailboxes

    assert cuda.page_locked(3, 5).is_pinned()
    for _ in range(2):  # the second mapping may be at the first one's address
        boxes = Mailboxes(100_000, 10, 3, 2)
        lock = cuda.lock(boxes.memory)
        assert lock is not None
        assert all(gradient.is_pinned() for gradient in boxes.gradients)
        source = torch.arange(100_000, dtype=torch.float32, device=cuda.where)
        cuda.finish()
        cuda.down.copy(boxes.gradients[2], source)
        cuda.down.record().wait()
        assert torch.equal(boxes.gradients[2], source.cpu())
        lock.release()
        lock.release()
        assert not boxes.gradients[0].is_pinned()
        boxes.close()


STEPS, BATCH, RATE = 12, 16, 0.05
NET = ModelSpec(
    name="mnist",
    arguments={"batch_norm": True, "hidden": [16, 16], "inputs": 64, "classes": 4},
    seed=5,
    image=ImageSpec(height=8, width=8, channels=1, flatten=True),
    num_classes=4,
)


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_replica_is_pytorchs_sgd(where: DeviceName, request: pytest.FixtureRequest) -> None:
    """Through mailbox, parameter server and pulls; nothing is stale with one step in flight."""
    if where == "cuda":
        request.getfixturevalue("cuda")
    model = NET.build_flat("cpu")
    oracle = FlatModel(NET.build().to(where))
    spec = ReplicasSpec(
        replicas=(0,),
        model=NET,
        steps=StepConfig(concurrent_steps=1, device=where),
        decoder=Decoder(spec=NET.image),
    )
    update = UpdateConfig(
        rule=Momentum(momentum=0.9),
        schedule=Schedule(learning_rate=RATE),
        batches_per_epoch=STEPS,
        epoch_examples=BATCH * STEPS,
    )
    data = SyntheticReplicas(spec, BATCH)._batches
    server = Server(Here, model, update, 2)
    workers = Workers(Here, spec, 1, server.endpoints(), SyntheticReplicas, BATCH)
    try:
        workers.of(0).call("train", 0, tuple(range(STEPS))).result(60)
        states = [
            a._object._server.call(lambda s: s.current.weights.clone()) for a in server.actors
        ]
    finally:
        workers.end()
        server.end()
    optimizer = torch.optim.SGD(oracle.parameters, lr=RATE, momentum=0.9)
    for i in range(STEPS):
        x, y = data[i % KEPT].inputs.to(where), data[i % KEPT].targets.to(where)
        oracle.zero_gradient()
        functional.cross_entropy(oracle.module.train()(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(torch.cat(states), oracle.weights.cpu(), rtol=1e-4, atol=1e-5)
