"""The reply stream keeps I4 and I5 under any order of writers, including stale ones, on every server."""

# ruff: noqa: D102 - the rules of the state machine have sentences for names

import asyncio
import secrets
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest
import redis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from imstream.keys import Keys
from imstream.model import Record, Terminal
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.replies import Appended, Opened, ReplyStore
from tests.redis.conftest import examples_on
from tests.support.reply_model import TERMINAL, ReplyModel, Said
from tests.support.servers import RedisServer

USER = 10001
REQUESTS = st.sampled_from(["0/1-0", "0/2-0", "1/1-0"])
ALL, MORE = "all", "more"
"""The writer of the last attempt has shown the record, or more, which Redis has lost."""

ENDS = st.sampled_from(
    [
        *[None] * 16,  # most appends are not the last
        Terminal("done", "stop", {"total_tokens": 7}),
        Terminal("done", "length"),
        Terminal("failed", reason="http_503", error="overloaded"),
    ]
)
RARELY = st.sampled_from([False, False, False, False, True])
"""For steps that end everything: otherwise most runs would be short."""

CONTINUES = st.sampled_from([0, 5, 100])
SHOWN = st.none() | st.integers(0, 8) | st.sampled_from([ALL, MORE])

LONGEST = 12


def text_of(attempt: int) -> str:
    """The text of an attempt. No two attempts share a character."""
    return "".join(chr(0x4E00 + 100 * attempt + index) for index in range(LONGEST))


class ReplyJudged(RuleBasedStateMachine):
    """One message: several requests open it, and writers of any attempt append, valid or not, repeated or late."""

    attempts: Bundle[int] = Bundle("attempts")
    appends: Bundle[dict[str, Any]] = Bundle("appends")
    records: Bundle[Record] = Bundle("records")

    def __init__(self, runner: asyncio.Runner, replies: ReplyStore, client: redis.Redis, keys: Keys) -> None:
        super().__init__()
        self._runner = runner
        self._replies = replies
        self._client: Any = client  # redis-py's return types are unions of all shapes
        self._message = secrets.token_hex(8)
        self._key = keys.reply(USER, self._message)
        self._model = ReplyModel()

    def run(self, step: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401 - what the step returns
        return self._runner.run(step)

    @initialize(request=st.none() | REQUESTS)
    def it_begins(self, request: str | None) -> None:
        if request is not None:
            self.opened(request)

    @rule()
    def it_is_marked_as_queued(self) -> None:
        self.run(self._replies.mark_queued(USER, self._message))
        self._model.mark_queued()

    @rule(
        request=REQUESTS,
        lost=REQUESTS | st.just(""),
        after=st.integers(0, 6),
        continues=CONTINUES,
        shown=SHOWN,
        target=attempts,
    )
    def a_request_opens_it(self, request: str, lost: str, after: int, continues: int, shown: int | str | None) -> int:
        return self.begun(request, lost, after, continues, shown)

    @rule(request=REQUESTS, word=st.sampled_from("abc"))
    def an_opening_is_repeated(self, request: str, word: str) -> None:
        self.opened(self._model.owner or request, word=word)

    @rule(request=REQUESTS, shown=SHOWN, target=attempts)
    def the_owner_continues_it(self, request: str, shown: int | str | None) -> int:
        return self.begun(self._model.owner or request, "", 0, 100, shown)

    def begun(self, request: str, lost: str, after: int, continues: int, shown: int | str | None) -> int:
        if isinstance(shown, str):
            last = self._model.last or Said(0, "", 0)
            after, shown = last.attempt, last.offset + (2 if shown == MORE else 0)
        opened = self.opened(request, lost=lost, after=after, continues=continues, shown=shown)
        return opened.attempt if isinstance(opened, Opened) else after

    def opened(self, request: str, **more: Any) -> object:  # noqa: ANN401 - the arguments of the store
        verdict = self.run(self._replies.open(USER, self._message, request=request, **more))
        assert verdict == self._model.open(request=request, **more)
        return verdict

    @rule(more=st.integers(0, 4), end=ENDS, target=appends)
    def the_latest_writer_goes_on(self, more: int, end: Terminal | None) -> dict[str, Any]:
        last = self._model.last or Said(1, "", 0)
        return self.appended(last.attempt, last.offset, last.offset + more, end)

    @rule(attempt=attempts, before=st.integers(0, 8), more=st.integers(0, 4), end=ENDS, target=appends)
    def a_writer_appends_anywhere(self, attempt: int, before: int, more: int, end: Terminal | None) -> dict[str, Any]:
        return self.appended(attempt, before, before + more, end)

    def appended(self, attempt: int, before: int, after: int, end: Terminal | None) -> dict[str, Any]:
        # There is no writer before the first attempt.
        attempt, after = max(attempt, 1), min(after, LONGEST)
        given = {
            "attempt": attempt,
            "before": min(before, after),
            "after": after,
            "text": text_of(attempt)[min(before, after) : after],
            "terminal": end,
        }
        self.an_append_is_repeated(given)
        return given

    @rule(given=appends)
    def an_append_is_repeated(self, given: dict[str, Any]) -> None:
        before = self.entries()
        verdict = self.run(self._replies.append(USER, self._message, **given))
        expected = self._model.append(**given)
        assert (verdict, getattr(verdict, "offset", 0)) == (expected, getattr(expected, "offset", 0))
        if verdict == Appended():
            record = self.run(self._replies.read(USER, self._message))
            assert record.attempt == given["attempt"]
            assert len(record.text) == given["after"]
        else:
            assert self.entries() == before  # a rejected writer changes nothing

    @rule(really=RARELY)
    def somebody_cancels(self, *, really: bool) -> None:
        if really:
            assert self.run(self._replies.cancel(USER, self._message)) == self._model.cancel()

    def entries(self) -> list[Said]:
        return [Said.read(fields) for _, fields in self._client.xrange(self._key)]

    @invariant()
    def the_stream_is_right(self) -> None:
        entries = self.entries()
        assert entries == [replace(said, terminal=None) for said in self._model.entries]
        # At most one end, and nothing after it (I4).
        assert not any(said.event in TERMINAL for said in entries[:-1])
        # Attempts only increase, and the text of each has no gap and no repetition (I5). It is new, or continues all
        # that was recorded before. Clients see a number that is not reused for another text.
        attempt, text, wires = 0, "", dict[int, str]()
        for said in entries:
            if said.event == "opened":
                assert said.attempt > attempt
                assert said.text in {"", text}
                attempt, text = said.attempt, said.text
                wire = said.wire or attempt
                assert text.startswith(wires.get(wire, ""))
                for earlier, offset in said.valid:
                    assert wires[earlier][:offset] == text[:offset]
            else:
                assert said.text == text_of(attempt)[len(text) : said.offset]
                text += said.text
            if said.attempt:
                wires[wire] = text
            assert said.attempt == attempt
            assert said.offset == len(text)
        record, expected = self.run(self._replies.read(USER, self._message)), self._model.read()
        assert record == expected
        assert getattr(record, "continued", None) == getattr(expected, "continued", None)
        assert not entries or self._client.pttl(self._key) > 0


@pytest.mark.timeout(600)  # it takes seconds, but shrinking a failure takes longer
def test_any_order_of_writers_is_judged_rightly(redis_server: RedisServer) -> None:
    known = Settings.load(redis_url=redis_server.url)
    with asyncio.Runner() as runner, redis_server.client() as client:
        connections = AsyncExitStack()

        async def connect() -> ReplyStore:
            redis_client = RedisClient(known.redis_url, connections=1, timeout=known.redis_timeout)
            return ReplyStore(await connections.enter_async_context(redis_client), known)

        replies = runner.run(connect())
        try:
            run_state_machine_as_test(
                # Any callable will do, whatever its type says.
                lambda: ReplyJudged(runner, replies, client, Keys(known.key_prefix)),  # type: ignore[arg-type]
                settings=settings(max_examples=examples_on(redis_server, 100), stateful_step_count=30),
            )
        finally:
            runner.run(connections.aclose())
