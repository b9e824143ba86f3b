"""The choice between one pass over several mini-batches and a pass over each."""

from downpour.workers.step.joining import JoinTrial


def test_the_faster_way_is_taken_once_both_have_been_tried() -> None:
    trial = JoinTrial()
    for _ in range(2 * trial.TRIES):
        joined = trial.next()
        assert trial.joined is None
        trial.add(joined, 0.02 if joined else 0.01)
    assert trial.joined is False
    assert not trial.next()


def test_long_passes_are_tried_once() -> None:
    trial = JoinTrial()
    for joined, seconds in ((True, 3.0), (False, 4.0)):
        assert trial.next() == joined
        trial.add(joined, seconds)
    assert trial.joined
