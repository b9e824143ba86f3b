"""What a run starts from: files as people have them, against what they hold."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import INITIAL, RunFolder
from downpour.cluster.training.api import create
from downpour.cluster.training.inputs import build_model
from downpour.models.errors import ModelError
from downpour.models.flat import FlatModel
from downpour.models.layout import flatten, state_dict
from downpour.paramserver.config import NetworkConfig
from tests.helpers import tiny
from tests.helpers.runs import assert_replays_to_the_bit, recorded

torch.set_num_threads(1)


def config(data: str = "nowhere", **model: Any) -> RunConfig:
    made = tiny.config(data, replicas=2, concurrent_steps=1, partitions=2)
    return dataclasses.replace(made, model=dataclasses.replace(made.model, **model))


def pretrained(classes: int = tiny.CLASSES, seed: int = 5) -> dict[str, torch.Tensor]:
    """Weights and BN statistics of the tiny net, from another seed."""
    spec = model_spec(config())
    arguments = {**spec.arguments, "classes": classes}
    flat: FlatModel = dataclasses.replace(spec, seed=seed, arguments=arguments).build_flat("cpu")
    generator = torch.Generator().manual_seed(1)
    flat.statistics.copy_(torch.rand(flat.statistics.shape, generator=generator) + 0.5)
    return {k: v.clone() for k, v in state_dict(flat.weights, flat.statistics, flat.layout).items()}


def taken(folder: RunFolder) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(str(folder.path / INITIAL))


@pytest.mark.parametrize(
    "form", ["safetensors", "state_dict", "wrapped", "prefixed", "run", "half"]
)
def test_a_file_of_the_same_network(tmp_path: Path, form: str) -> None:
    state, options = pretrained(), dict[str, Any]()
    counted = {**state, "norm0.num_batches_tracked": torch.tensor(7)}
    path = tmp_path / "weights.pt"
    if form == "safetensors":
        path = tmp_path / "weights.safetensors"
        safetensors.torch.save_file(state, path)
    elif form == "run":
        path = tmp_path / "before"
        path.mkdir()
        safetensors.torch.save_file(state, path / "model.safetensors")
    elif form == "state_dict":
        torch.save(counted, path)
    elif form == "half":
        state = {k: v.half().float() for k, v in state.items()}
        torch.save({k: v.half() for k, v in state.items()}, path)
    elif form == "wrapped":
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        torch.save({f"net.{k}": v for k, v in state.items()} | {"ema.x": torch.ones(1)}, path)
        options["init_prefix"] = "net."
    chosen = config(init=str(path), **options)
    folder = create(chosen, name="a", runs=tmp_path / "runs")
    found = taken(folder)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name
    flat = model_spec(chosen).build_flat("cpu")
    weights, _ = flatten(state, flat.layout)
    for start in (folder.initial, None):  # from the folder, as a resume does; and from the file
        assert build_model(chosen, start).weights.tolist() == weights.tolist()


def test_a_head_of_another_width_is_left_fresh_only_if_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ten.safetensors"
    ten = pretrained(classes=10)
    safetensors.torch.save_file({**ten, "extra": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"\[10, 16\] in the file and \[4, 16\].*--init-matching"):
        create(config(init=str(path)), name="a", runs=tmp_path / "runs")
    assert not (tmp_path / "runs" / "a").exists()
    chosen = config(init=str(path), init_matching=True)
    found = taken(create(chosen, name="a", runs=tmp_path / "runs"))
    own = model_spec(chosen).build_flat("cpu")
    fresh = state_dict(own.weights, own.statistics, own.layout)
    same = [name for name in fresh if torch.equal(found[name], ten[name])]
    heads = [name for name in fresh if fresh[name].shape != ten[name].shape]
    assert len(heads) == 2
    assert len(same) == len(fresh) - 2
    assert all(torch.equal(found[name], fresh[name]) for name in heads)
    told = " ".join(capsys.readouterr().err.split())
    assert f"{len(same)} of the network's {len(fresh)} tensors" in told
    assert all(name in told for name in [*heads, "extra"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.popitem(), "lacks"),
        (lambda s: s.update(other=torch.zeros(2)), "unknown 'other'"),
        (lambda s: next(iter(s.values())).fill_(torch.nan), "not finite"),
    ],
)
def test_a_file_of_another_network_is_refused(tmp_path: Path, change: Any, named: str) -> None:
    state = pretrained()
    change(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=named) as told:
        create(config(init=str(tmp_path / "w.pt")), name="a", runs=tmp_path)
    assert "\n" not in str(told.value)
    assert "give" in str(told.value)
    assert not (tmp_path / "a").exists()


def test_files_that_are_none_are_told_and_nothing_in_them_is_run(tmp_path: Path) -> None:
    state = pretrained()
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "ddp.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(Unpickled(), tmp_path / "code.pt")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name, words in {
        "ddp.pt": "give --init-prefix module.",
        "list.pt": "no tensors by name",
        "code.pt": "cannot be read",
        "text.safetensors": "cannot be read",
        "empty": "without model.safetensors",
        "nothing.pt": "does not exist",
    }.items():
        with pytest.raises(UserError, match=words) as told:
            create(config(init=str(tmp_path / name)), name="a", runs=tmp_path)
        assert "\n" not in str(told.value), name
    with pytest.raises(UserError, match="nothing fits"):
        create(config(init=str(tmp_path / "ddp.pt"), init_matching=True), name="a", runs=tmp_path)
    chosen = config(init=str(tmp_path / "ddp.pt"), init_prefix="body.")
    with pytest.raises(UserError, match="with which no name"):
        create(chosen, name="a", runs=tmp_path)
    with pytest.raises(ValueError, match="init is none"):
        config(init_matching=True)
    with pytest.raises(ModelError, match="names no parameter"):
        create(config(freeze=("layer7",)), name="a", runs=tmp_path)
    assert not Unpickled.made


class Unpickled:
    """An object of somebody's; reading a file must not make one."""

    made = False

    def __setstate__(self, state: object) -> None:
        """Called if it is unpickled."""
        Unpickled.made = True

    def __getstate__(self) -> object:
        """Something, so that there is a state to set."""
        return {"a": 1}


def test_what_is_frozen_stays_through_a_whole_run_over_the_network(tmp_path: Path) -> None:
    data = tiny.dataset(tmp_path / "data", 300)
    chosen = config(data, freeze=("hidden.0",))
    server = dataclasses.replace(chosen.server, network=NetworkConfig(transport="network"))
    run = recorded(tmp_path / "run", dataclasses.replace(chosen, server=server))
    outcome = run.go()
    run.assert_exactly_once(outcome)
    flat = model_spec(chosen).build_flat("cpu")
    frozen = flat.layout.trained
    assert 0 < frozen < flat.layout.num_parameters
    assert torch.equal(run.weights[frozen:], flat.weights[frozen:])
    assert not torch.equal(run.weights[:frozen], flat.weights[:frozen])
    assert_replays_to_the_bit(tmp_path / "run", outcome)


def test_a_frozen_layer_gets_the_statistics_of_the_file(tmp_path: Path) -> None:
    """They are in what partitions begin with, and a network that trains normalizes with them."""
    path = tmp_path / "weights.safetensors"
    state = pretrained()
    safetensors.torch.save_file(state, path)
    chosen = config(init=str(path), freeze=("hidden.0",))
    model = build_model(chosen)
    flat = model_spec(chosen).build_flat("cpu")
    _, statistics = flatten(state, flat.layout)
    assert torch.equal(model.initial_statistics(), statistics)
    flat.module.train()
    assert flat.has_frozen_norms
