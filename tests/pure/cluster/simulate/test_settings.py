"""Settings in words, and the runs that they make."""

import pytest

from downpour.cluster.config import recipes
from downpour.cluster.errors import UserError
from downpour.cluster.simulate.options import SimulateConfig, configured
from downpour.cluster.simulate.settings import LearningConfig, LearningSetting, lasting, settings


def test_a_setting_says_policy_number_steps_in_flight_and_rate() -> None:
    setting = LearningSetting.parse("synchronous:8/all@0.4")
    given = setting.given(SimulateConfig(replicas=3, staleness_bound=7))
    assert given == SimulateConfig(
        replicas=3,
        staleness_bound=7,
        staleness_policy="synchronous",
        round_pushes=8,
        in_flight="all",
    )
    config = configured(recipes.find("mnist-bn"), given)
    made = lasting(config, LearningConfig(epochs=4, learning_rate=0.1), setting)
    assert made.policy.epochs == 4
    assert made.server.schedule.learning_rate == 0.4
    bound = LearningSetting.parse("drop:60").given(SimulateConfig())
    assert bound == SimulateConfig(staleness_policy="drop", staleness_bound=60)


def test_what_a_setting_leaves_out_is_the_runs() -> None:
    (own,) = settings(LearningConfig())
    assert own.given(SimulateConfig(seed=5)) == SimulateConfig(seed=5)
    config = configured(recipes.find("mnist-bn"), SimulateConfig())
    assert lasting(config, LearningConfig(), own) == config
    learn = LearningConfig(learning_rate=0.1, momentum=0.5)
    made = lasting(config, learn, LearningSetting.parse("scale"))
    assert made.server.schedule.learning_rate == 0.1
    assert made.server.momentum == 0.5
    with pytest.raises(UserError, match="momentum is 1"):
        lasting(config, LearningConfig(momentum=1.0), own)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("eager", "give POLICY"),
        ("drop:x", "give POLICY"),
        ("asynchronous:5", "asynchronous has no number"),
        ("drop@1e-", "no learning rate"),
    ],
)
def test_what_is_no_setting_is_refused(words: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LearningConfig(compare=(words,))


@pytest.mark.parametrize(
    "given",
    [{"epochs": 0}, {"goal": ()}, {"goal": (97.0,)}, {"score_every_epochs": None}],
)
def test_what_cannot_be_learned_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="give"):
        LearningConfig(**given)  # type: ignore[arg-type]
