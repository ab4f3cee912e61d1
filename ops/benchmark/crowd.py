"""A crowd of users in one process, for `ops.benchmark.scale`. It obeys lines of JSON on standard input.

Each line is a command of `Crowd` with its arguments (`{"command": "open", "count": 10, …}`), answered with one line of
JSON, or several, by its description. The sockets stay open until standard input ends.
"""

import asyncio
import gc
import json
import random
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import uvloop

from ops.benchmark.backend import counted_deltas
from ops.benchmark.load import OPENING, quantiles
from ops.benchmark.member import Answer, Member, Seen

STEP_LIMIT = 120.0
"""Time limit of each command, besides the duration that it was given, in seconds."""

BEAT_LIMIT = 20.0
"""Seconds after which the answer to the last heartbeat counts as missing."""

ASKING = 200
"""Maximum number of members that wait for the same stage of an answer."""

HEARTBEAT = 25.0
"""Seconds between two heartbeats of a member, as nodes announce it by default."""


def counted(deltas: int, milliseconds: int) -> str:
    """The question for a counted answer; `{user}` stands for the member."""
    return f"counted {{user}} {deltas} {milliseconds}"


def is_right(answer: Answer) -> bool:
    """Whether a counted answer is complete and its text is that of the backend."""
    key, deltas, _ = map(int, answer.contents.split()[1:])
    return answer.end == "done" and answer.text == "".join(counted_deltas(key, deltas))


class Crowd:
    """The commands."""

    def __init__(self) -> None:
        self._members: list[Member] = []
        self._seen = Seen()

    async def open(self, *, urls: Sequence[str], count: int, first_user: int, source: str) -> AsyncIterator[Any]:
        """Open and log in `count` sockets from the address `source`."""
        began, gate = time.monotonic(), asyncio.Semaphore(OPENING)
        self._members = [Member(first_user + number, urls, source, self._seen) for number in range(count)]

        async def open_one(member: Member) -> None:
            async with gate:
                await member.connect()

        async with asyncio.timeout(STEP_LIMIT):
            await asyncio.gather(*map(open_one, self._members))
        gc.collect()
        gc.freeze()
        yield {"seconds": time.monotonic() - began}

    async def heartbeats(self, *, seconds: float) -> AsyncIterator[Any]:
        """Send one heartbeat for each member, evenly within `seconds`, and wait for the answers."""
        self._seen.beats = []
        await self._beat(seconds)
        with suppress(TimeoutError):  # reported as missing
            async with asyncio.timeout(BEAT_LIMIT):
                while len(self._seen.beats) < len(self._members):  # noqa: ASYNC110 - an event for each is dearer
                    await asyncio.sleep(0.05)
        yield {"answered": len(self._seen.beats), "seconds": quantiles(self._seen.beats)}

    async def _beat(self, seconds: float) -> None:
        began = time.monotonic()
        for number, member in enumerate(self._members):
            await asyncio.sleep(began + seconds * number / len(self._members) - time.monotonic())
            member.beat()

    async def say(self, *, contents: str, until: str) -> AsyncIterator[Any]:
        """Let each member send one message; answered when each has come to the stage `until` (see `Answer.reach`)."""
        gate = asyncio.Semaphore(ASKING)

        async def say_one(member: Member) -> None:
            async with gate:
                await member.ask(contents).stages[until]

        async with asyncio.timeout(STEP_LIMIT):
            await asyncio.gather(*map(say_one, self._members))
        yield {"codes": self._seen.codes}

    async def storm(self, *, limit: float) -> AsyncIterator[Any]:
        """Answer at once; again when all answers have ended, or after `limit` seconds. Times are from the death."""
        self._seen.codes.clear()
        yield {"under_way": sum(answer.end is None for answer in self._answers())}
        beating = asyncio.create_task(self._beat_on())
        try:
            with suppress(TimeoutError):  # reported as missing
                async with asyncio.timeout(limit):
                    while not all(answer.end for answer in self._answers()):  # noqa: ASYNC110 - same
                        await asyncio.sleep(0.05)
        finally:
            beating.cancel()
        yield self._storm_seen()

    async def _beat_on(self) -> None:
        while True:
            await self._beat(HEARTBEAT)

    def _answers(self) -> list[Answer]:
        return [member.answer for member in self._members if member.answer is not None]

    def _storm_seen(self) -> dict[str, Any]:
        hit = [member for member in self._members if member.lost_at is not None]
        death = min((member.lost_at or 0.0 for member in hit), default=0.0)
        answers = [member.answer for member in hit if member.answer is not None and member.answer.before >= 0]
        return {
            "clients": len(self._members),
            "lost": len(hit),
            "right": sum(map(is_right, self._answers())),
            "ends": Counter(answer.end or "none" for answer in self._answers()),
            "refusals": self._seen.refusals,
            "codes": self._seen.codes,
            "back": quantiles([member.back_at - death for member in hit if member.back_at]),
            "again": quantiles([answer.again - death for answer in answers if answer.again]),
            "whole": quantiles([answer.whole - death for answer in answers if answer.whole]),
            "ended": quantiles([answer.ended - death for answer in answers if answer.end]),
        }

    async def rate(
        self, *, chats: float, ramp: float, seconds: float, deltas: int, milliseconds: int
    ) -> AsyncIterator[Any]:
        """Begin `chats` counted answers a second, whether earlier ones have ended or not, while a member is free.

        Answered after `ramp` seconds, `seconds` later, and when all answers have ended.
        """
        free, running = deque(self._members), set[asyncio.Task[None]]()
        finished: list[Answer] = []
        start = time.monotonic()
        number = begun = skipped = 0

        async def chat(member: Member) -> None:
            answer = member.ask(counted(deltas, milliseconds))
            await answer.stages["end"]
            finished.append(answer)
            free.append(member)

        async def go_on(until: float) -> None:
            nonlocal number, begun, skipped
            while (at := start + (number + random.random()) / chats) < until:  # noqa: S311 - spreading load
                number += 1
                await asyncio.sleep(at - time.monotonic())
                if not free:  # this machine is too slow, or too busy, for the load
                    skipped += 1
                    continue
                begun += 1
                running.add(task := asyncio.create_task(chat(free.popleft())))
                task.add_done_callback(running.discard)
            await asyncio.sleep(until - time.monotonic())

        await go_on(start + ramp)
        before, self._seen.first = (begun, len(finished), self._seen.frames, self._seen.bytes), []
        yield {"steady": True, "under_way": len(running)}
        await go_on(start + ramp + seconds)
        names = ("begun", "ended", "frames", "bytes")
        after = (begun, len(finished), self._seen.frames, self._seen.bytes)
        window: dict[str, Any] = {name: new - old for name, old, new in zip(names, before, after, strict=True)}
        yield {**window, "under_way": len(running), "first": quantiles(self._seen.first)}
        async with asyncio.timeout(STEP_LIMIT + deltas * milliseconds / 1000):
            await asyncio.gather(*running)
        yield {"chats": begun, "skipped": skipped, "right": sum(map(is_right, finished)), "codes": self._seen.codes}

    def close(self) -> None:
        """Close all sockets."""
        for member in self._members:
            member.close()


async def main() -> None:
    """Obey until standard input ends."""
    crowd = Crowd()
    while line := await asyncio.to_thread(sys.stdin.readline):
        arguments = json.loads(line)
        async for answer in getattr(crowd, arguments.pop("command"))(**arguments):
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
    crowd.close()


if __name__ == "__main__":
    uvloop.run(main())
