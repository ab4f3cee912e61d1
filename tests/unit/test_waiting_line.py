"""Places in the queue of a node, and estimates of when answers begin."""

import random
from collections.abc import Callable
from heapq import heapify, heappop, heappush

import pytest

from imstream.reply_buffer import Place, ReplyBuffer
from imstream.worker.waiting_line import RECENT, ServiceTimes, WaitingLine

USER = 10001

DISTRIBUTIONS: dict[str, Callable[[random.Random], float]] = {
    "all alike": lambda chance: chance.uniform(9.9, 10.1),
    "short and long": lambda chance: chance.choice([2.0, 30.0]),
    "exponential": lambda chance: chance.expovariate(0.1),
    "log-normal": lambda chance: chance.lognormvariate(2.0, 0.8),
}


def line(*, slots: int = 1, limit: int = 100) -> WaitingLine:
    return WaitingLine(slots=lambda: slots, limit=limit)


def reply(name: object, *, is_watched: bool = True) -> ReplyBuffer:
    return ReplyBuffer(USER, str(name), is_watched=is_watched)


def positions(*replies: ReplyBuffer) -> list[int | None]:
    return [None if one.place is None else one.place.position for one in replies]


# Places


async def test_a_place_counts_those_before_it_and_moves_up_when_they_start() -> None:
    waiting, replies = line(), [reply(n) for n in range(3)]
    for n, one in enumerate(replies):
        waiting.join(f"100-{n}", one, n + 1)
    assert positions(*replies) == [1, 2, 3]
    waiting.start("job", "100-0")
    waiting.update()
    assert positions(*replies[1:]) == [1, 2]
    assert len(waiting) == 2


async def test_messages_that_join_out_of_order_have_the_places_of_their_entries() -> None:
    waiting, replies = line(), [reply(n) for n in range(3)]
    for n in (2, 0, 1):
        waiting.join(f"{90 + 10 * n}-0", replies[n], n + 1)
    waiting.update()
    assert positions(*replies) == [1, 2, 3]


async def test_entries_of_an_earlier_process_are_counted_until_they_start() -> None:
    waiting, first, second = line(), reply(1), reply(2)
    waiting.join("100-0", first, 3)
    waiting.join("100-1", second, 4)
    assert positions(first, second) == [3, 4]
    for n in range(2):
        waiting.start(n, f"50-{n}")
    waiting.update()
    assert positions(first, second) == [1, 2]


async def test_a_message_that_has_started_does_not_join() -> None:
    waiting, late = line(), reply("late")
    waiting.start("job", "100-5")
    waiting.join("100-5", late, 1)
    assert (len(waiting), late.place) == (0, None)


async def test_jobs_of_other_streams_leave_the_line_alone() -> None:
    waiting, one = line(slots=2), reply(1)
    waiting.join("100-0", one, 1)
    waiting.start("job", None)
    waiting.update()
    assert positions(one) == [1]


async def test_the_line_is_as_long_as_the_queue_at_most_and_keeps_no_reply_alive() -> None:
    waiting, kept = line(limit=10), reply("kept")
    for n in range(20):
        waiting.join(f"100-{n}", reply(n), min(n + 1, 10))
    waiting.join("100-20", kept, 10)
    assert len(waiting) == 10
    assert positions(kept) == [10]
    waiting.update()


# Estimates


async def test_there_is_no_estimate_before_anything_was_measured_nor_while_the_backend_is_away() -> None:
    waiting, one = line(), reply(1)
    waiting.join("100-0", one, 1)
    assert one.place is not None
    assert one.place.wait is None
    waiting.start("duplicate", None)
    waiting.end("duplicate", is_measured=False)
    waiting.update()
    assert one.place.wait is None
    waiting.start("job", None)
    waiting.end("job", is_measured=True)
    waiting.update()
    assert one.place.wait is not None
    waiting.is_paused = lambda: True
    waiting.update()
    assert one.place.wait is None


async def test_nothing_is_estimated_for_a_message_whose_place_is_not_requested() -> None:
    waiting, one = line(), reply(1, is_watched=False)
    waiting.start("job", None)
    waiting.end("job", is_measured=True)
    waiting.join("100-0", one, 1)
    before = one.place
    waiting.update()
    assert before is not None
    assert before.wait is None
    assert one.place is before


def test_the_next_waits_for_the_rest_of_the_one_that_runs() -> None:
    times = ServiceTimes()
    for _ in range(3):
        times.add(10.0)
    assert times.starts([4.0], 0, 3) == [6.0, 16.0, 26.0]
    assert times.starts([], 1, 2) == [0.0, 10.0]
    assert times.starts([12.0], 0, 2) == [0.0, 10.0]  # overdue, and all take equally long


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("slots", [1, 4, 64])
def test_estimates_are_right_on_average(kind: str, slots: int) -> None:
    """A simulation: a full node is observed at many moments, and each estimate is compared with the actual time."""
    chance, take = random.Random(1), DISTRIBUTIONS[kind]  # noqa: S311 - no secret
    waiting = 2 * slots + 2
    said = happened = 0.0
    for _ in range(60 if slots < 64 else 12):
        times = ServiceTimes()
        for _ in range(RECENT):
            times.add(take(chance))
        ages, ends = _busy(take, chance, slots)
        starts = times.starts(sorted(ages, reverse=True), 0, waiting)
        assert starts is not None
        assert starts == sorted(starts)
        said += sum(starts)
        heapify(ends)
        for _ in range(waiting):
            happened += (start := heappop(ends))
            heappush(ends, start + take(chance))
    assert 0.8 < said / happened < 1.25


def _busy(take: Callable[[random.Random], float], chance: random.Random, slots: int) -> tuple[list[float], list[float]]:
    """For how long the requests in the slots have been running at some moment, and for how long they will be."""
    ages, ends = [], []
    for _ in range(slots):
        moment, begun, ended = chance.uniform(300, 400), 0.0, 0.0
        while ended <= moment:
            begun, ended = ended, ended + take(chance)
        ages.append(moment - begun)
        ends.append(ended - moment)
    return ages, ends


# Repeated reports


@pytest.mark.parametrize(
    ("told", "now", "is_news"),
    [
        (Place(3, 30.0, 0.0), Place(2, 20.0, 0.9), False),  # too soon
        (Place(3, 30.0, 0.0), Place(2, 20.0, 1.0), True),
        (Place(3, 30.0, 0.0), Place(3, 25.0, 5.0), False),  # as was estimated
        (Place(3, 30.0, 0.0), Place(3, 40.0, 5.0), True),
        (Place(3, 30.0, 0.0), Place(3, 27.0, 5.0), False),  # two seconds of 27
        (Place(3, 2.0, 0.0), Place(3, 2.5, 1.5), True),
        (Place(3, None, 0.0), Place(3, None, 9.0), False),
        (Place(3, None, 0.0), Place(3, 20.0, 9.0), True),
        (Place(3, 20.0, 0.0), Place(3, None, 9.0), True),
    ],
)
def test_a_place_is_reported_when_it_has_changed_and_a_second_has_passed(
    told: Place, now: Place, *, is_news: bool
) -> None:
    assert now.is_news_after(told) is is_news
