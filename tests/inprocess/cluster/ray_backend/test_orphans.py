"""An actor that outlives its driver ends by itself if no other driver comes."""

from downpour.cluster.ray_backend.orphans import ORPHAN_S, Attendance


def test_an_actor_ends_once_its_driver_has_been_gone_for_long() -> None:
    attendance, gone = Attendance("a"), set[str]()
    over = gone.__contains__
    assert not attendance.look(over, 1000.0)
    gone.add("a")
    assert not attendance.look(over, 2000.0)  # it may have gone just now
    assert not attendance.look(over, 2000.0 + ORPHAN_S - 1)
    assert attendance.look(over, 2000.0 + ORPHAN_S)


def test_another_driver_has_all_the_time_again() -> None:
    attendance, gone = Attendance("a"), {"a"}
    over = gone.__contains__
    assert not attendance.look(over, 0.0)
    attendance.driver = "b"
    assert not attendance.look(over, ORPHAN_S)
    gone.add("b")
    assert not attendance.look(over, ORPHAN_S + 1)
    assert not attendance.look(over, 2 * ORPHAN_S)
    assert attendance.look(over, 2 * ORPHAN_S + 1)


def test_a_driver_that_was_out_of_sight_for_a_while_counts_as_there() -> None:
    attendance = Attendance("a")
    assert not attendance.look(lambda _: True, 0.0)
    assert not attendance.look(lambda _: False, 10.0)
    assert not attendance.look(lambda _: True, ORPHAN_S)
    assert attendance.look(lambda _: True, 2 * ORPHAN_S)
