from grpo_operator.control.health import Vitals, ailments, unready
from grpo_operator.control.watches import Watches


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_version_that_does_not_come_is_overdue_until_it_comes():
    clock = Clock()
    watches = Watches(clock)
    watches.expect("pods", "p1", 7)
    clock.now = 50
    assert watches.overdue_seconds() == 50
    watches.deliver("pods", "p1", 6, gone=False)
    assert watches.overdue_seconds() == 50
    watches.deliver("pods", "p1", 8, gone=False)
    assert watches.overdue_seconds() == 0
    watches.expect("pods", "p1", 8)
    assert watches.overdue_seconds() == 0, "seen already"


def test_what_is_deleted_or_not_listed_is_not_waited_for():
    watches = Watches(Clock())
    watches.expect("pods", "p1", 7)
    watches.expect("pods", "p2", 7)
    watches.deliver("pods", "p1", 9, gone=True)
    watches.keep_only("pods", set())
    assert watches.overdue_seconds() == 0


def test_a_watch_that_begins_anew_may_have_missed_an_end():
    watches = Watches()
    for uid in ("p1", "p2"):
        watches.deliver("pods", uid, 1, gone=False, listed=True)
    assert not watches.take_gaps(), "its first list"
    watches.deliver("pods", "p1", 2, gone=False)
    watches.deliver("grpojobs", "j1", 2, gone=False, listed=True)
    assert not watches.take_gaps()
    for uid in ("p1", "p3"):
        watches.deliver("pods", uid, 3, gone=False, listed=True)
    assert watches.take_gaps() and not watches.take_gaps()


def test_an_operator_is_restarted_for_what_a_restart_cures_only():
    well = Vitals(True, 0, 0, 0, synced=True, leader="me")
    assert ailments(well) == [] and unready(well) == []
    waiting = Vitals(True, 0, 0, 0, synced=False, leader="")
    assert ailments(waiting) == [] and len(unready(waiting)) == 2
    assert ailments(Vitals(False, 130, 301, 301, synced=True, leader="me")) == [
        "the watches have ended",
        "the watches are dead: a change is missing for 130 s",
        "a job waits for 301 s for a worker",
        "a reconcile hangs for 301 s",
    ]
