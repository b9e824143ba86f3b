"""What a factory is given: what it names, and what published nets take without naming it."""

import random
import sys
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from downpour.models import registry
from downpour.models.conversion.randomness import RandomState
from downpour.models.errors import RegistryError

OFFERED = {"num_classes": 7, "image_size": 32, "in_chans": 1, "in_channels": 1}


@pytest.fixture
def name_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Gives a factory a name by which the registry finds it, in a module of some library."""

    def put(factory: object, library: str = "a_users") -> str:
        module = types.ModuleType(library)
        module.make = factory  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, library, module)
        return f"{library}:make"

    return put


class Told(nn.Module):
    """Remembers what it was given."""

    def __init__(self, **given: object) -> None:
        super().__init__()
        self.given = given


def given_to(name: str, **arguments: object) -> dict[str, object]:
    made = registry.build(name, 11, offered=OFFERED, **arguments)
    assert isinstance(made, Told)
    return made.given


def test_a_factory_that_takes_anything_gets_the_classes_and_no_seed(
    name_of: Callable[..., str],
) -> None:
    name = name_of(lambda **anything: Told(**anything))
    assert given_to(name) == {"num_classes": 7}
    assert given_to(name, num_classes=3, width=2) == {"num_classes": 3, "width": 2}


def test_a_factory_that_passes_on_to_one_without_classes_is_called_without_them(
    name_of: Callable[..., str],
) -> None:
    def narrow(depth: int = 1) -> nn.Module:
        return Told(depth=depth)

    name = name_of(lambda **anything: narrow(**anything))
    assert given_to(name, depth=3) == {"depth": 3}
    with pytest.raises(RegistryError, match="unexpected keyword argument 'num_classes'"):
        given_to(name, num_classes=3)  # the user's own word is not dropped


def test_a_seed_goes_to_whoever_names_it(name_of: Callable[..., str]) -> None:
    name = name_of(lambda seed, **anything: Told(seed=seed, **anything))
    assert given_to(name) == {"seed": 11, "num_classes": 7}
    assert given_to(name, seed=5) == {"seed": 5, "num_classes": 7}


def test_channels_go_to_whoever_names_them_and_to_timm(name_of: Callable[..., str]) -> None:
    assert given_to(name_of(lambda in_channels: Told(c=in_channels))) == {"c": 1}
    anything = name_of(lambda model_name, **rest: Told(**rest), "timm")
    assert given_to(anything, model_name="x") == {"num_classes": 7, "in_chans": 1}
    assert registry.takes_channels(anything)
    assert not registry.takes_channels(name_of(lambda **anything: Told(**anything)))


def test_an_error_of_a_factory_names_its_file_and_line(name_of: Callable[..., str]) -> None:
    def broken() -> nn.Module:
        raise KeyError("width")

    line = broken.__code__.co_firstlineno + 1
    with pytest.raises(RegistryError, match=rf"KeyError: 'width' \(.*test_registry.py:{line}\)"):
        given_to(name_of(broken))


def test_a_library_that_is_missing_is_named_with_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RegistryError, match="pip install timm"):
        registry.build("timm:create_model", 0)


def test_what_tells_no_arguments_is_refused() -> None:
    with pytest.raises(RegistryError, match="does not tell its arguments"):
        registry.build("builtins:dict", 0)


def test_whatever_generator_a_factory_draws_from_it_repeats(name_of: Callable[..., str]) -> None:
    def drawn() -> nn.Module:
        numpys = np.random.rand()  # noqa: NPY002
        return Told(numbers=(random.random(), numpys, float(torch.rand(()))))

    name = name_of(drawn)
    before = RandomState.now()
    first = given_to(name)
    assert before.is_now()
    random.random()
    assert not before.is_now()
    np.random.rand()  # noqa: NPY002
    assert given_to(name) == first
    before.restore()
    assert before.is_now()


def test_an_argument_without_a_keyword_goes_by_place(name_of: Callable[..., str]) -> None:
    def placed(num_classes: int, /, *, image_size: int) -> nn.Module:
        return Told(num_classes=num_classes, image_size=image_size)

    assert given_to(name_of(placed)) == {"num_classes": 7, "image_size": 32}
