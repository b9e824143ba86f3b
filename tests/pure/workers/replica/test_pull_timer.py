"""How far ahead weights are asked for."""

from downpour.workers.replica.pull_timer import PullTimer, turns_ahead


def test_weights_are_asked_for_ahead_by_as_many_turns_as_their_way_takes() -> None:
    assert turns_ahead(0.001, 1.0, 9) == 0
    assert turns_ahead(0.2, 1.0, 9) == 1
    assert turns_ahead(2.5, 1.0, 9) == 3
    assert turns_ahead(2.5, 1.0, 2) == 2
    assert turns_ahead(2.5, 1.0, 0) == 0
    way, now_s, leads = PullTimer(), 0.0, [0]
    for _ in range(300):
        way.asked(now_s, leads[-1])
        now_s += 0.0 if leads[-1] else 1.5  # weights that were asked for ahead are there
        leads.append(way.come(now_s, 9))
        now_s += 1.0
    assert leads[:4] == [0, 0, 0, 0]
    assert leads[10] == 2
    assert max(i for i, lead in enumerate(leads) if not lead) > 250, "the way is measured again"
    assert leads[-1] == 2
