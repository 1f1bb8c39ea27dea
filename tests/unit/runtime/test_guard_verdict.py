"""The sentence on ranks that stand still, from what each of them says; and the record that it comes from."""

import mmap
import time

import pytest

from megatrain.runtime.guard.record import RING, SIZE, WARM_UP, WINDOW, Record, entry_text, read
from megatrain.runtime.guard.verdict import Call, Statement, judge, place


def call(number: int, *, channel: str = "tp", ranks: tuple[int, ...] = (0, 1), **facts: object) -> Call:
    fields: dict[str, object] = {"age_s": 3.0, "operation": "all_reduce", "shape": "(4,)", "dtype": "float32"}
    return Call(channel, ranks, number, **(fields | {"site": "a.py:1"} | facts))  # type: ignore[arg-type]


def rank(number: int, *calls: Call, waits: bool = True, **facts: object) -> Statement:
    fields = {"phase": "training", "step": 3, "age_s": 3.0, "waits_s": 3.0 if waits else None, "last": calls}
    return Statement(number, f"h{number}", **(fields | facts))  # type: ignore[arg-type]


def verdict(*found: Statement) -> str:
    return judge(list(found), lambda age_s: f"{age_s:.0f} s ago").sentence


def test_who_is_waited_for_through_others_is_the_cause() -> None:
    """0 waits for 1 in tp, 1 for 3 in dp, and 2 for 3 in tp: 3 stands in its loader."""
    dp = {"channel": "dp", "ranks": (1, 3)}
    low = {"ranks": (0, 1)}
    high = {"ranks": (2, 3)}
    said = verdict(
        rank(0, call(8, **low)),
        rank(1, call(7, **low), call(5, **dp)),
        rank(2, call(8, **high)),
        rank(3, call(7, **high), call(4, **dp), waits=False, phase="batch"),
    )
    assert said.startswith("Rank 3 (host h3) did not arrive at all_reduce of float32 (4,), number ")
    assert said.endswith("it is in the phase 'batch' of step 3.")


def test_a_different_call_under_the_same_number_is_named_by_the_minority() -> None:
    others = call(7, ranks=(0, 1, 2))
    odd = call(7, ranks=(0, 1, 2), shape="(5,)", site="b.py:2")
    said = verdict(
        rank(0, others, recent=(others,)), rank(1, odd, recent=(odd,)), rank(2, others, recent=(others,))
    )
    assert said == (
        "Rank 1 (host h1) called all_reduce of float32 (5,), number 7 of tp (ranks 0-2) at b.py:2, where rank 0 called "
        "all_reduce of float32 (4,) at a.py:1."
    )


def test_uneven_exchanges_are_not_taken_for_different_calls() -> None:
    one, two = (call(7, operation="all_to_all", shape=shape) for shape in ("(4,)", "(9,)"))
    assert "called" not in verdict(rank(0, one), rank(1, two)).replace("(a.py", "")


@pytest.mark.parametrize(
    ("fate", "words"),
    [
        ("failed", "failed at 9 s ago"),
        ("gone", "ended without a word at 9 s ago"),
        ("lost", "has given no sign since"),
    ],
)
def test_a_fate_comes_before_what_others_wait_for(fate: str, words: str) -> None:
    waits = rank(0, call(8))
    assert words in verdict(waits, rank(1, call(7), fate=fate, fate_age_s=9.0))


def test_a_host_that_is_lost_is_one_sentence() -> None:
    lost = [Statement(n, "h9", fate="lost", fate_age_s=9.0) for n in (4, 5, 6, 7)]
    assert verdict(rank(0, call(8)), *lost).startswith("Ranks 4-7 (host h9) has given no sign since 9 s ago")


def test_a_stopped_rank_is_the_cause_even_in_a_circle() -> None:
    said = verdict(
        rank(0, call(8), call(2, channel="dp")),
        rank(1, call(7), call(3, channel="dp"), state="T"),
    )
    assert said.startswith("Rank 1 (host h1) did not arrive at all_reduce")
    assert "it is stopped (SIGSTOP), in the phase 'training' of step 3" in said


def test_a_collective_that_all_have_begun_is_the_networks() -> None:
    assert "All ranks arrived at all_reduce" in verdict(rank(0, call(8)), rank(1, call(8)))


def test_the_place_is_the_first_line_that_is_no_librarys() -> None:
    stack = (
        "Thread 0x1 (most recent call first):\n"
        '  File "/x/other.py", line 1 in other\n'
        "\n"
        "Current thread 0x2 (most recent call first):\n"
        '  File "/usr/lib/python3.11/threading.py", line 327 in wait\n'
        '  File "/y/megatrain/data/loader.py", line 20 in load\n'
        '  File "/y/megatrain/train/loop.py", line 2 in main\n'
    )
    assert place(stack) == "megatrain/data/loader.py:20 in load"


@pytest.fixture
def record() -> Record:
    return Record()


def memory(record: Record) -> mmap.mmap:
    return mmap.mmap(record.file, SIZE, prot=mmap.PROT_READ)


def test_a_record_keeps_the_last_call_of_each_channel_and_the_last_of_all(record: Record) -> None:
    first, second = record.channel(), record.channel()
    for n in range(RING + 10):
        record.entered(first, entry_text(first, "all_reduce", f"({n},)", "float32", "a.py:1"))
        record.waited()
    record.entered(second, entry_text(second, "barrier", "", "", "x" * 500 + "b.py:2"))
    found = read(memory(record), entries=5)
    assert [(each.channel, each.number, each.shape) for each in found.last] == [
        (first, RING + 10, f"({RING + 9},)"),
        (second, 1, ""),
    ]
    assert [each.number for each in found.recent] == [RING + 7, RING + 8, RING + 9, RING + 10, 1]
    assert found.last[1].site.endswith("b.py:2")
    assert found.waits_from > 0


def test_own_seconds_are_those_of_a_step_without_waiting(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    channel = record.channel()
    text = entry_text(channel, "all_reduce", "", "", "a.py:1")
    for step in range(WARM_UP + WINDOW):
        record.doing("batch", step)
        now += 1.0
        record.doing("training", step)
        now += 2.0
        record.entered(channel, text)
        now += 5.0
        record.waited()
        record.doing("result", step)
        now += 7.0
        if step % 2:  # it counts neither for its step nor for the next one
            record.doing("saving", step)
            now += 50.0
    record.doing("batch", -1)
    found = read(memory(record))
    assert found.own_s == 3.0
    assert found.timed_steps == (WARM_UP + WINDOW + 1) // 2 - WARM_UP
