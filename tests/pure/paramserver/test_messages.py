"""Messages: what an outcome means."""

from downpour.paramserver.messages import Outcome


def test_which_outcomes_settle() -> None:
    assert {o for o in Outcome if not o.settled} == {
        Outcome.REFUSED_MIXED,
        Outcome.REFUSED_UNKNOWN,
        Outcome.REFUSED_STALE,
        Outcome.REFUSED_QUARANTINE,
    }
