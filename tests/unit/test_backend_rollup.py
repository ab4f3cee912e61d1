"""The connection of an answer that pauses: data sent meanwhile is read afterwards, and nothing else changes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from imstream.ai import held_connection
from imstream.ai.backend import OpenAIBackend
from imstream.ai.rollup import RollUp, Sleeper
from imstream.errors import BackendError
from imstream.settings import Settings
from tests.support.asking import Asking
from tests.support.scripted_backend import DONE, LIMIT, Exchange, chunk, event, scripted_backend
from tests.support.waiting import wait_until

END = event(chunk(finish_reason="stop")) + DONE


class HeldRollUp(RollUp):
    """The connection of a busy node, which rests until the test lets it go on."""

    def __init__(self) -> None:
        super().__init__(timedelta(0))
        self.resting: Sleeper | None = None
        self.asked = 0
        self.running = 0
        self.is_busy = True

    def join(self, sleeper: Sleeper) -> None:  # noqa: ARG002 - the signature of `RollUp`
        """See `RollUp`."""
        self.running += 1

    def leave(self, sleeper: Sleeper) -> None:  # noqa: ARG002 - same
        """See `RollUp`."""
        self.running -= 1
        self.resting = None

    def rest(self, sleeper: Sleeper) -> bool:
        """See `RollUp`."""
        self.asked += 1
        self.resting = sleeper if self.is_busy else None
        return self.is_busy

    def wake(self, *, is_busy: bool = True) -> None:
        """Let it go on, and rest again if the node is still busy."""
        self.is_busy = is_busy
        sleeper, self.resting = self.resting, None
        assert sleeper is not None
        sleeper.wake()

    def has_ended(self) -> bool:
        """Let it go on if it rests; return whether the answer has ended."""
        if self.resting is not None:
            self.wake()
        return self.running == 0


@pytest.fixture(params=["plain", "tls"], autouse=True)
def _connection(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its transport can read a TLS connection: so it is here, although the server has no certificate."""
    if request.param == "tls":
        monkeypatch.setattr(held_connection, "readable_socket", lambda _: None)


@asynccontextmanager
async def asking_busy(**settings: Any) -> AsyncIterator[tuple[Asking, HeldRollUp]]:  # noqa: ANN401 - any setting
    async with scripted_backend() as backend:
        rollup = HeldRollUp()
        loaded = Settings.load(ai_url=backend.url, **settings)
        async with asyncio.timeout(3 * LIMIT), OpenAIBackend(loaded, None, rollup) as client:
            yield Asking(client, backend), rollup


async def test_the_first_text_is_read_at_once_and_text_during_a_pause_together_and_in_order() -> None:
    async with asking_busy() as (asked, rollup):

        async def script(exchange: Exchange) -> None:
            await exchange.start()
            await exchange.send(event(chunk("first ")))
            await wait_until(lambda: rollup.resting is not None, "the connection rests")
            assert asked.pieces == ["first "]
            for text in ("a", "b", "c"):
                await exchange.send(event(chunk(text)))
                assert asked.pieces == ["first "]
            rollup.wake()
            await wait_until(lambda: rollup.resting is not None, "the connection rests again")
            await exchange.send(event(chunk("!")), END)
            rollup.wake()
            await exchange.end()

        asked.backend.then(script)
        completion = await asked.ask()
        assert completion.finish_reason == "stop"
        assert asked.pieces == ["first ", "abc", "!"]
        assert rollup.running == 0


async def test_a_connection_does_not_rest_before_its_first_text() -> None:
    async with asking_busy() as (asked, rollup):

        async def script(exchange: Exchange) -> None:
            await exchange.start()
            reasoning = chunk()
            reasoning["choices"][0]["delta"] = {"reasoning_content": "hm"}
            await exchange.send(b": queued\n\n", event(chunk("")), event(reasoning))
            await exchange.send(event(reasoning))
            assert rollup.asked == 0
            await exchange.send(event(chunk("yes")))
            await wait_until(lambda: rollup.resting is not None, "the connection rests")
            await exchange.send(END)
            rollup.wake(is_busy=False)
            await exchange.end()

        asked.backend.then(script)
        await asked.ask()
        assert asked.pieces == ["yes"]


async def test_the_rest_of_a_connection_is_no_silence_of_its_backend() -> None:
    async with asking_busy(ai_idle_timeout="2s") as (asked, rollup):
        loop = asyncio.get_running_loop()

        async def script(exchange: Exchange) -> None:
            await exchange.start()
            await exchange.send(event(chunk("a")))
            await wait_until(lambda: rollup.resting is not None, "the connection rests")
            await exchange.send(event(chunk("b")), END)
            rested_from = loop.time()
            await wait_until(lambda: loop.time() > rested_from + 2.5, "it would have rested for longer than the limit")
            await exchange.end()

        asked.backend.then(script)
        await asked.ask()
        assert asked.text == "ab"


async def test_silence_after_the_rest_is_silence() -> None:
    async with asking_busy(ai_idle_timeout="600ms") as (asked, rollup):

        async def script(exchange: Exchange) -> None:
            await exchange.start()
            await exchange.send(event(chunk("a")))
            await wait_until(lambda: rollup.resting is not None, "the connection rests")
            rollup.wake()
            await exchange.gone()

        asked.backend.then(script)
        with pytest.raises(BackendError) as caught:
            await asked.ask()
        assert caught.value.reason == "idle_timeout"


async def test_the_time_for_the_whole_answer_goes_on_while_it_rests() -> None:
    async with asking_busy(ai_total_timeout="500ms") as (asked, rollup):

        async def script(exchange: Exchange) -> None:
            await exchange.start()
            await exchange.send(event(chunk("a")))
            await exchange.gone()

        asked.backend.then(script)
        with pytest.raises(BackendError) as caught:
            await asked.ask()
        assert caught.value.reason == "total_timeout"
        assert rollup.running == 0


async def test_cancelling_an_answer_that_rests_closes_its_connection_at_once() -> None:
    async with asking_busy() as (asked, rollup):

        async def script(exchange: Exchange) -> None:
            await exchange.start()
            await exchange.send(event(chunk("a")))
            await exchange.gone()

        asked.backend.then(script)
        answer = asyncio.create_task(asked.ask())
        await wait_until(lambda: rollup.resting is not None, "the connection rests")
        answer.cancel()
        await asked.backend.requests[0].gone()
        with pytest.raises(asyncio.CancelledError):
            await answer
        assert rollup.running == 0


async def test_text_before_a_broken_connection_is_read() -> None:
    async with asking_busy() as (asked, rollup):

        async def script(exchange: Exchange) -> None:
            await exchange.start()
            await exchange.send(event(chunk("a")))
            await wait_until(lambda: rollup.resting is not None, "the connection rests")
            await exchange.send(event(chunk("b")))
            exchange.half_close()
            await wait_until(rollup.has_ended, "the answer has ended")

        asked.backend.then(script)
        with pytest.raises(BackendError):
            await asked.ask()
        assert asked.text == "ab"


async def test_a_connection_that_breaks_while_it_rests_is_found_broken_afterwards() -> None:
    async with asking_busy() as (asked, rollup):

        async def script(exchange: Exchange) -> None:
            await exchange.start()
            await exchange.send(event(chunk("a")))
            await wait_until(lambda: rollup.resting is not None, "the connection rests")
            exchange.reset()
            await wait_until(rollup.has_ended, "the answer has ended")

        asked.backend.then(script)
        with pytest.raises(BackendError) as caught:
            await asked.ask()
        assert caught.value.kind == "broken"


async def test_a_connection_that_has_rested_is_used_again() -> None:
    async with asking_busy() as (asked, rollup):

        async def script(exchange: Exchange) -> None:
            await exchange.start()
            await exchange.send(event(chunk("a")))
            await wait_until(lambda: rollup.resting is not None, "the connection rests")
            await exchange.send(END)
            rollup.wake()
            await exchange.end()

        asked.backend.then(script, script)
        await asked.ask()
        await asked.ask()
        assert asked.text == "aa"
        assert [request.connection for request in asked.backend.requests] == [0, 0]
