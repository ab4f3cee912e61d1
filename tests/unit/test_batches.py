"""The batcher, in virtual time: each text gets its own result, calls are few, and a slow one delays no other text."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.ai.moderations import MAX_CALLS, MIN_INTERVAL, Batcher
from tests.support.letting_go import lets_go
from tests.support.virtual_time import in_virtual_time


@dataclass
class Service:
    """Returns texts in capitals. `durations`: seconds of each call, in order; None: the call fails at once."""

    durations: Sequence[float | None] = ()
    asked: list[list[str]] = field(default_factory=list)
    under_way: int = 0
    most: int = 0

    async def __call__(self, texts: Sequence[str]) -> list[str]:
        """Make one call."""
        number = len(self.asked)
        duration = self.durations[number % len(self.durations)] if self.durations else 0.1
        self.asked.append(list(texts))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            if duration is None:
                raise ValueError("broken")
            await asyncio.sleep(duration)
        finally:
            self.under_way -= 1
        return [text.upper() for text in texts]


@in_virtual_time
async def test_the_first_goes_at_once_and_those_that_come_meanwhile_go_together() -> None:
    service = Service()
    batches = Batcher(service, size=16)
    loop = asyncio.get_running_loop()
    began = loop.time()
    first = asyncio.create_task(batches.submit("a"))
    await asyncio.sleep(MIN_INTERVAL / 2)
    assert service.asked == [["a"]]
    others = [asyncio.create_task(batches.submit(text)) for text in "bcd"]
    assert await first == "A"
    assert loop.time() - began == pytest.approx(0.1)
    assert await asyncio.gather(*others) == ["B", "C", "D"]
    assert loop.time() - began == pytest.approx(MIN_INTERVAL + 0.1)
    assert service.asked == [["a"], ["b", "c", "d"]]


@in_virtual_time
async def test_what_comes_in_one_turn_of_the_loop_goes_together() -> None:
    service = Service()
    batches = Batcher(service, size=2)
    assert await asyncio.gather(*map(batches.submit, "abcde")) == list("ABCDE")
    assert [len(one) for one in service.asked] == [2, 2, 1]


@in_virtual_time
async def test_a_slow_call_holds_nobody_up() -> None:
    service = Service(durations=(1000.0, 0.1))
    batches = Batcher(service, size=16)
    loop = asyncio.get_running_loop()
    slow = asyncio.create_task(batches.submit("slow"))
    await asyncio.sleep(1)
    began = loop.time()
    assert await batches.submit("quick") == "QUICK"
    assert loop.time() - began == pytest.approx(0.1)
    assert not slow.done()
    assert await slow == "SLOW"


@in_virtual_time
async def test_a_full_batch_does_not_wait() -> None:
    service = Service(durations=(1000.0, 0.1))
    batches = Batcher(service, size=2)
    slow = asyncio.create_task(batches.submit("slow"))
    await asyncio.sleep(MIN_INTERVAL / 2)
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert await asyncio.gather(*map(batches.submit, "ab")) == ["A", "B"]
    assert loop.time() - began == pytest.approx(0.1)
    await slow


@in_virtual_time
async def test_without_batching_each_text_is_asked_about_alone() -> None:
    service = Service()
    batches = Batcher(service, size=1)
    assert await asyncio.gather(*map(batches.submit, "abcdefghijkl")) == list("ABCDEFGHIJKL")
    assert all(len(one) == 1 for one in service.asked)
    assert service.most == MAX_CALLS


@in_virtual_time
async def test_who_is_cancelled_hurts_nobody_and_is_not_asked_about_if_there_is_time() -> None:
    service = Service()
    batches = Batcher(service, size=16)
    first = [asyncio.create_task(batches.submit(text)) for text in "ab"]
    await asyncio.sleep(MIN_INTERVAL / 4)
    second = [asyncio.create_task(batches.submit(text)) for text in "cd"]
    await asyncio.sleep(MIN_INTERVAL / 4)
    for one in (first[0], second[0]):
        one.cancel()
    outcomes = await asyncio.gather(*first, *second, return_exceptions=True)
    assert [outcomes[1], outcomes[3]] == ["B", "D"]
    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert isinstance(outcomes[2], asyncio.CancelledError)
    assert service.asked == [["a", "b"], ["d"]]


@in_virtual_time
async def test_a_defect_is_told_to_all_of_its_batch_and_the_next_one_is_asked() -> None:
    batches = Batcher(Service(durations=(None, 0.1)), size=16)
    for outcome in await asyncio.gather(*map(batches.submit, "ab"), return_exceptions=True):
        assert isinstance(outcome, RuntimeError)
        assert isinstance(outcome.__cause__, ValueError)
    assert await batches.submit("c") == "C"


@in_virtual_time
async def test_a_defect_lets_go_of_who_asked() -> None:
    batches = Batcher(Service(durations=(None,)), size=16)
    assert await lets_go(lambda _: batches.submit("a"))


@in_virtual_time
async def test_those_that_wait_can_be_answered_without_a_call() -> None:
    service = Service(durations=(1000.0,))
    batches = Batcher(service, size=16)
    under_way = asyncio.create_task(batches.submit("under way"))
    await asyncio.sleep(MIN_INTERVAL / 4)
    waiting = asyncio.create_task(batches.submit("waiting"))
    await asyncio.sleep(MIN_INTERVAL / 4)
    batches.resolve_queued("not now")
    assert await waiting == "not now"
    await asyncio.sleep(1)
    assert service.asked == [["under way"]]
    await batches.aclose()
    with pytest.raises(asyncio.CancelledError):
        await under_way


Submitted = tuple[float, float | None]
"""Seconds from the previous text to this one, and until it is cancelled."""

MOMENTS = st.sampled_from([0.0, MIN_INTERVAL / 2, MIN_INTERVAL, 2 * MIN_INTERVAL, 0.05, 0.3])


@given(
    size=st.integers(1, 4),
    people=st.lists(st.tuples(MOMENTS, st.none() | MOMENTS), max_size=60),
    durations=st.lists(st.none() | st.sampled_from([0.0, MIN_INTERVAL, 0.1, 1.0]), min_size=1, max_size=8),
)
def test_in_any_interleaving_each_gets_its_own_answer(
    size: int, people: list[Submitted], durations: list[float | None]
) -> None:
    service = Service(durations)
    batches = Batcher(service, size=size)

    async def person(number: int, patience: float | None) -> None:
        try:
            async with asyncio.timeout(patience):
                assert await batches.submit(f"text {number}") == f"TEXT {number}"
        except TimeoutError:
            assert patience is not None
        except RuntimeError:
            assert None in durations

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            for number, (pause, patience) in enumerate(people):
                await asyncio.sleep(pause)
                group.create_task(person(number, patience))
        await batches.aclose()

    in_virtual_time(everybody)()
    texts = [text for batch in service.asked for text in batch]
    assert len(texts) == len(set(texts)), "no text is submitted twice"
    assert all(1 <= len(batch) <= size for batch in service.asked)
    assert service.most <= MAX_CALLS
    assert service.under_way == 0
    patient = {f"text {number}" for number, (_, patience) in enumerate(people) if patience is None}
    assert patient <= set(texts)
