"""The messages that wait for a slot of this node: their places in the queue, and when their answers may begin.

admitted ──join──▶ waiting ──start──▶ running ──end──▶ its duration is a measured service time
"""

import asyncio
import itertools
import weakref
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heapify, heapreplace

from imstream.reply_buffer import Place, ReplyBuffer

RECENT = 64  # number of service times that estimates are made from: those of the last requests

GOLDEN = (5**0.5 - 1) / 2
PLAYS = 8
MAX_PLAYED = 256  # requests that are played through for an estimate; those behind are expected at the average pace
UPDATE_INTERVAL = 0.5  # seconds between two updates of places that a client wants to know
_MORE = 32  # positions behind the last one that an estimate is made for: messages are expected to join there

EntryId = tuple[int, int]


class ServiceTimes:
    """How long requests have recently held a slot."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)

    def add(self, seconds: float) -> None:
        """Add a measured time."""
        self._recent.append(seconds)

    def starts(self, running: Sequence[float], free: int, count: int) -> list[float] | None:
        """Estimate in how many seconds each of the next `count` requests gets a slot; None while nothing is measured.

        `running`: for how long the requests in the other slots have held them. The queue is played through some times,
        with times that differ as the recent ones do: the first of many slots becomes free long before the average one.
        """
        if not self._recent or count == 0:
            return [] if self._recent else None
        times = sorted(self._recent)
        played = [_play(times, running, free, min(count, MAX_PLAYED), (n + 0.5) / PLAYS) for n in range(PLAYS)]
        starts = [sum(alternatives) / PLAYS for alternatives in zip(*played, strict=True)]
        pace = sum(times) / len(times) / (len(running) + free)
        return starts + [starts[-1] + pace * more for more in range(1, count - len(starts) + 1)]


def _play(times: Sequence[float], running: Sequence[float], free: int, count: int, chance: float) -> list[float]:
    """When `count` requests get a slot, if all take recent times. `chance`: which ones, from 0 to 1.

    Multiples of the golden ratio spread evenly between 0 and 1, however many there are, and need no random numbers.
    """
    ends = [0.0] * free + [_rest(times, age, (chance + n * GOLDEN) % 1) for n, age in enumerate(running)]
    heapify(ends)
    size = len(times)
    spread = (chance + n * GOLDEN for n in itertools.count(len(running)))
    return [heapreplace(ends, ends[0] + times[int(share % 1 * size)]) for share in itertools.islice(spread, count)]


def _rest(times: Sequence[float], age: float, share: float) -> float:
    """The rest of a request of this age, if it takes longer than a share of those that took longer than its age."""
    longer = times[bisect_right(times, age) :]
    return longer[int(share * len(longer))] - age if longer else share * (times[-1] - times[0])


class WaitingLine:
    """The line before the slots of this node.

    Entries that this process did not add to the stream are counted, as far as they stand before its own: those of an
    earlier process.
    """

    def __init__(self, *, slots: Callable[[], int], limit: int) -> None:
        """`slots`: of the node, now; `limit`: maximum messages that wait."""
        self.is_paused: Callable[[], bool] = lambda: False
        """Whether no estimate can be made, because the backend is away or the node drains."""
        self.reason: str | None = None  # why the line does not move, as sent to clients: a word for programs
        self._slots = slots
        self._limit = limit
        self._times = ServiceTimes()
        self._ids: list[EntryId] = []
        self._replies: dict[EntryId, weakref.ref[ReplyBuffer]] = {}
        self._ahead = 0  # entries before the first of `_ids` that this process did not add
        self._last_started: EntryId = (0, 0)
        self._running: dict[object, float] = {}  # when each running job got its slot
        self._starts: list[float] = []  # the last estimate, for each position
        self._starts_at = -UPDATE_INTERVAL

    def __len__(self) -> int:
        return len(self._ids)

    def join(self, entry_id: str, reply: ReplyBuffer, position: int) -> None:
        """Add an admitted message, unless it has started. `position`: how many waited when it was admitted."""
        entry = _parse(entry_id)
        if entry <= self._last_started:
            return
        index = bisect_left(self._ids, entry)
        # Too high by those that started or joined meanwhile: the next one to join corrects it.
        ahead = max(0, position - index - 1)
        self._ahead = min(self._ahead, ahead) if self._ids else ahead
        self._ids.insert(index, entry)
        self._replies[entry] = weakref.ref(reply)
        surplus = max(0, len(self._ids) - self._limit)
        self._remove_first(surplus)
        self._place(reply, max(1, self._ahead + index + 1 - surplus), asyncio.get_running_loop().time())

    def start(self, job: object, entry_id: str | None) -> None:
        """Note that a job has got a slot. `entry_id`: of its request, if it is in the stream of this node."""
        self._running[job] = asyncio.get_running_loop().time()
        if entry_id is None:
            return
        entry = _parse(entry_id)
        self._last_started = max(self._last_started, entry)
        if started := bisect_right(self._ids, entry):
            self._ahead = 0
            self._remove_first(started)  # entries are delivered in their order
        else:
            self._ahead = max(0, self._ahead - 1)

    def end(self, job: object, *, is_measured: bool) -> None:
        """Note that a job has released its slot. `is_measured`: it is an example of how long requests take."""
        began = self._running.pop(job)
        if is_measured:
            self._times.add(asyncio.get_running_loop().time() - began)

    async def run(self) -> None:
        """Update the places that a client wants to know, until cancelled."""
        while True:
            await asyncio.sleep(UPDATE_INTERVAL)
            self.update()

    def update(self) -> None:
        """Update the places that a client wants to know."""
        replies = ((n, self._replies[entry]()) for n, entry in enumerate(self._ids, self._ahead + 1))
        watched = [(position, reply) for position, reply in replies if reply is not None and reply.is_watched]
        now, self._starts_at = asyncio.get_running_loop().time(), -UPDATE_INTERVAL
        for position, reply in reversed(watched):  # the first estimate is for the last, and holds for all
            self._place(reply, position, now)

    def _place(self, reply: ReplyBuffer, position: int, now: float) -> None:
        """Set the place of a reply, with an estimate if a client requests it."""
        reply.move_to(Place(position, self._wait(position, now) if reply.is_watched else None, now, self.reason))

    def _wait(self, position: int, now: float) -> float | None:
        """Estimate the seconds until the request at this position gets a slot. An estimate is used for a while."""
        if self.reason is not None or self.is_paused():
            return None
        if now - self._starts_at >= UPDATE_INTERVAL or len(self._starts) < position:
            running = [now - began for began in self._running.values()]
            free = max(0, self._slots() - len(running))
            self._starts, self._starts_at = self._times.starts(running, free, position + _MORE) or [], now
        if not self._starts:
            return None
        return max(0.0, self._starts[position - 1] - (now - self._starts_at))

    def _remove_first(self, count: int) -> None:
        for entry in self._ids[: max(0, count)]:
            del self._replies[entry]
        del self._ids[: max(0, count)]


def _parse(entry_id: str) -> EntryId:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)
