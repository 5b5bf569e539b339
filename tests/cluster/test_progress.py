"""Progress lines say what is done, when, and how long the rest takes."""

import re

from cluster.progress import Counted, dated, duration


def test_a_line_has_the_time_of_day():
    lines: list[str] = []
    dated(lines.append)("intent@2: live")
    assert re.fullmatch(r"\d\d:\d\d:\d\d intent@2: live", lines[0])


def test_counted_work_says_how_much_is_left():
    lines: list[str] = []
    now = [100.0]
    counted = Counted("adapter", lines.append, clock=lambda: now[0])
    now[0] = 110.0
    counted.update(1, 3, "intent")
    now[0] = 160.0
    counted.update(2, 3, "device")
    counted.update(3, 3, "topic")
    assert lines == [
        "adapter 1 of 3 (about 20 s left): intent",
        "adapter 2 of 3 (about 30 s left): device",
        "adapter 3 of 3: topic",
    ]


def test_many_small_pieces_do_not_fill_a_log():
    lines: list[str] = []
    now = [0.0]
    counted = Counted("tensor", lines.append, every_s=10.0, clock=lambda: now[0])
    for done in range(1, 101):
        now[0] += 1.0
        counted.update(done, 100)
    assert len(lines) == 10
    assert lines[0] == "tensor 10 of 100 (about 90 s left)".replace("90 s", "2 min")
    assert lines[-1] == "tensor 100 of 100"


def test_work_that_is_done_at_once_says_nothing():
    lines: list[str] = []
    Counted("tensor", lines.append, every_s=10.0, clock=lambda: 0.0).update(1, 1)
    assert lines == []


def test_durations_are_readable():
    assert [duration(s) for s in (3.4, 89, 90, 600, 7200)] == ["3 s", "89 s", "2 min", "10 min", "2.0 h"]
