"""What a caller hands over becomes a name, and bytes that another process makes the same thing of.

Another process is a Python that has none of this one's modules: it gets the bytes and the name.
"""

from __future__ import annotations

import base64
import functools
import subprocess
import sys
import textwrap
import threading
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from downpour.cluster.errors import UserError
from downpour.cluster.training import carry
from downpour.models import by_value
from downpour.models.errors import RegistryError
from downpour.models.mlp import MnistNet
from downpour.models.registry import build, find_loss
from tests.helpers import commands, tiny

SCALE = 3.0


def factory(num_classes: int = 4) -> nn.Module:
    """A factory that other processes can import."""
    return nn.Linear(2, num_classes)


def in_a_cell(source: str, name: str, module: str = "__main__") -> Any:
    """An object as a notebook's cell defines it: its module has no file."""
    here = types.ModuleType(module)
    exec(textwrap.dedent(source), here.__dict__)  # noqa: S102
    return here.__dict__[name]


CELL = """
import torch
from torch import nn

WIDTH = 5

def hidden():
    return nn.Linear(3, WIDTH)

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body, self.head = hidden(), nn.Linear(WIDTH, num_classes)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))
"""

ELSEWHERE = """
import base64, sys
from downpour.models import by_value
from downpour.models.registry import build

name, text = sys.argv[1:]
by_value.admit({name: base64.b64decode(text)})
net = build(name, 7, offered={"num_classes": 4})
print([tuple(p.shape) for p in net.parameters()], float(net.body.weight.detach().sum()))
"""


def test_what_others_can_import_goes_by_its_name() -> None:
    handed = carry.model(factory)
    assert (handed.name, handed.label, handed.carried) == (f"{__name__}:factory", "factory", {})
    assert carry.model(MnistNet).name == "downpour.models.mlp:MnistNet"
    assert carry.loss(functional.cross_entropy).name == "torch.nn.functional:cross_entropy"
    for name in ("mnist", "mine:net"):
        assert carry.model(name).name == name


def test_a_class_of_a_cell_is_the_same_in_another_process() -> None:
    """With the function and the global that it uses; weights come from the seed there too."""
    net = in_a_cell(CELL, "Net")
    handed = carry.model(net)
    (name, pickled), *_ = handed.carried.items()
    assert handed.name == name
    assert name.startswith("by-value:Net.")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, name, base64.b64encode(pickled).decode()],
        env={"PYTHONPATH": str(commands.ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    by_value.admit(handed.carried)
    mine = build(name, 7, offered={"num_classes": 4})
    shapes = [tuple(p.shape) for p in mine.parameters()]
    assert done.stdout.strip() == f"{shapes} {float(mine.body.weight.detach().sum())}"  # type: ignore[union-attr, operator, arg-type]


@pytest.mark.parametrize(
    "given",
    [
        lambda num_classes: nn.Linear(2, num_classes),
        functools.partial(factory, num_classes=4),
        in_a_cell(
            "def f():\n    from torch import nn\n    return nn.Linear(2, 4)", "f", "vanished"
        ),
    ],
    ids=["lambda", "partial", "module without a file"],
)
def test_what_nobody_else_can_import_travels_by_value(given: Any) -> None:
    handed = carry.model(given)
    assert by_value.is_by_value(handed.name)
    by_value.admit(handed.carried)
    net = build(handed.name, 0, offered={"num_classes": 4})
    assert isinstance(net, nn.Linear)
    assert net.out_features == 4


def test_a_module_is_copied_with_its_buffers_and_its_parameters_go_apart() -> None:
    net = nn.Sequential(nn.Linear(200, 200), nn.BatchNorm1d(200))
    net[0].bias.requires_grad_(False)  # type: ignore[union-attr]
    net.register_buffer("table", torch.arange(5.0))
    handed = carry.model(net)
    assert handed.label == "Sequential"
    assert handed.state is not None
    assert set(handed.state) == set(net.state_dict())
    assert all(torch.equal(handed.state[k], v) for k, v in net.state_dict().items())
    (pickled,) = handed.carried.values()
    assert len(pickled) < 4 * 200 * 200, "the weights are in the pickle"
    by_value.admit(handed.carried)
    one, two = (build(handed.name, seed) for seed in (1, 2))
    assert one is not two
    assert [(n, p.shape, p.requires_grad) for n, p in one.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in net.named_parameters()
    ]
    assert torch.equal(one.table, net.table)  # type: ignore[arg-type]
    assert not any(p.any() for p in one[0].parameters())  # type: ignore[index, union-attr]
    net[0].weight.data.fill_(9.0)  # type: ignore[union-attr, operator]
    assert not torch.equal(handed.state["0.weight"], net[0].weight)  # type: ignore[arg-type, union-attr]


def test_a_loss_may_be_an_object() -> None:
    handed = carry.loss(nn.CrossEntropyLoss(label_smoothing=0.1))
    by_value.admit(handed.carried)
    outputs, targets = torch.randn(6, 4), torch.arange(6) % 4
    expected = functional.cross_entropy(outputs, targets, label_smoothing=0.1)
    assert torch.equal(find_loss(handed.name)(outputs, targets), expected)


@pytest.mark.parametrize(
    ("hand_over", "given", "words"),
    [
        (carry.model, 3, "model is 3: give a torch.nn.Module, a function or class"),
        (carry.loss, None, "loss is None: give a function of outputs and targets"),
        (carry.loss, nn.CrossEntropyLoss, r"give an instance, CrossEntropyLoss\(\)"),
        (carry.model, functools.partial(factory, threading.Lock()), "cannot be sent to other"),
        (carry.model, functools.partial(factory, bytes(65 << 20)), "has 65 MiB of its own"),
        (carry.model, "__main__:no_such_net", "has no such function: define it before this"),
    ],
)
def test_what_cannot_be_handed_over_is_a_line(hand_over: Any, given: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        hand_over(given)
    assert "\n" not in str(caught.value)


def test_a_configuration_may_name_what_the_script_defines(monkeypatch: pytest.MonkeyPatch) -> None:
    net = in_a_cell(CELL, "Net")
    monkeypatch.setattr(sys.modules["__main__"], "net_of_mine", net, raising=False)
    config = tiny.config("data", model="__main__:net_of_mine")
    found = carry.from_main(config)
    assert found.model.model in found.model.carried
    assert carry.from_main(found) == found


def test_bytes_that_are_not_those_of_the_name_are_refused() -> None:
    name = by_value.name_of("net", b"one")
    with pytest.raises(RegistryError, match="does not have the bytes that its name says"):
        by_value.admit({name: b"two"})
    with pytest.raises(RegistryError, match="it is not in the run's folder"):
        by_value.find("model", name)
    by_value.admit({name: "nobody trusts it"})
    with pytest.raises(RegistryError, match=rf"model '{name}' cannot be used: nobody trusts it"):
        by_value.find("model", name)
    by_value.admit({name: b"one"})
    with pytest.raises(RegistryError, match="cannot be unpickled here"):
        by_value.find("model", name)
