"""The choice between one pass over several mini-batches and a pass over each."""

from downpour.workers.step.joining import JoinTrial


def test_the_faster_way_is_taken_once_both_have_been_tried() -> None:
    trial = JoinTrial()
    for _ in range(2 * trial.TRIES):
        joined = trial.next()
        assert trial.joined is None
        trial.add(joined, 2.0 if joined else 1.0)
    assert trial.joined is False
    assert not trial.next()
