"""A network with PyTorch's own layers through a run: its statistics are PyTorch's, to the end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.run import RunConfig
from downpour.cluster.run.folder import MODEL
from downpour.cluster.training.inputs import loader
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.images.decode import decode
from downpour.workers.evaluation.predictor import Network, Predictor
from tests.helpers import tiny
from tests.helpers.runs import Run


def published(data: str) -> RunConfig:
    """One step after the other, at a rate that changes no weights to speak of."""
    base = tiny.config(
        data, replicas=1, concurrent_steps=1, epochs=2, learning_rate=1e-12, bn_statistics="moving"
    )
    model = dataclasses.replace(base.model, model="tests.helpers.published:network", arguments={})
    return dataclasses.replace(base, model=model)


def test_its_statistics_are_what_torch_would_have_kept(tmp_path: Path) -> None:
    config = published(tiny.dataset(tmp_path / "data", 320))
    run = Run(tmp_path / "run", config)
    outcome = run.go()
    run.assert_exactly_once(outcome)

    theirs = model_spec(config).build().train()
    fresh = theirs.get_submodule("fresh")
    assert isinstance(fresh, nn.BatchNorm1d)
    load = loader(config, run.plan)
    with torch.no_grad():
        for epoch in range(config.policy.epochs):
            for batch in range(run.plan.num_batches):
                number = epoch * run.plan.num_batches + batch + 1
                fresh.momentum = 1 / number  # None, written out
                theirs(load(epoch, batch)[0])
    state = safetensors.torch.load_file(run.folder.path / MODEL)
    expected = theirs.state_dict()
    assert set(state) == {name for name in expected if "num_batches" not in name}
    assert state["frozen.running_mean"].tolist() == [0.5] * 6
    for name, tensor in state.items():
        # An exponential average depends on the order of mini-batches, which a window changes.
        loose = name.startswith("bn.running")
        torch.testing.assert_close(tensor, expected[name], rtol=0.2 if loose else 1e-4, atol=1e-5)
    theirs.load_state_dict(state)

    network = Network.load(model_spec(config), str(run.folder.path / MODEL))
    dataset = Dataset.open(config.data.data, "test")
    rows = RowReader(dataset).take(np.arange(dataset.num_rows))
    inputs, labels = map(torch.from_numpy, decode(rows, config.model.input))
    with torch.no_grad():
        scores: Tensor = theirs.eval()(inputs)
    found = Predictor([network]).probabilities(rows)
    torch.testing.assert_close(found, scores.softmax(1), rtol=1e-4, atol=1e-5)
    assert outcome.evaluation is not None
    accuracy = float((scores.argmax(1) == labels).float().mean())
    assert outcome.evaluation.score.accuracy == pytest.approx(accuracy, abs=0.006)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in network.folded().modules())


class Looks(nn.Module):
    """Reads what a layer holds, which is not there once the layer is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.bn = nn.Linear(64, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.map(x))
        assert self.bn.running_mean is not None
        return y + self.bn.running_mean


def test_a_network_that_looks_into_its_layers_is_not_folded() -> None:
    config = published("")
    model = dataclasses.replace(config.model, model=f"{__name__}:Looks")
    spec = model_spec(dataclasses.replace(config, model=model))
    network = Network(spec=spec, model=spec.build_flat("cpu"))
    network.model.module.eval()
    x = torch.rand(3, 64)
    torch.testing.assert_close(network.folded()(x), network.model.module(x))
