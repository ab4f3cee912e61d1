"""A node is killed at each step of a request: the message is answered once, and its client gets all of it."""

from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from tests.support.backend_scripts import continues
from tests.support.one_node import one_node
from tests.support.peer import Peer, Told
from tests.support.scripted_backend import chunk, event, hangs, scripted_backend, streams
from tests.support.servers import RedisServer

USER = 10001

ANSWER = ("Nothing ", "is ", "lost, ", "一个字", "都不丢 😀")

BEFORE_THE_END = ("begun", "admitted", "delivered", "opened", "first-text", "flushed", "last-text")
AFTER_THE_END = ("removed", "ended", "told", "finished")


async def _until_it_breaks(someone: Peer) -> None:
    """Read frames until the connection ends."""
    try:
        while True:
            await someone.frame()
    except ConnectionClosed:
        return


WITH_TEXT = ("first-text", "flushed", "last-text")


@pytest.mark.parametrize(
    ("point", "option"),
    [
        *((point, "none") for point in (*BEFORE_THE_END, *AFTER_THE_END)),
        *((point, "assistant") for point in WITH_TEXT),
    ],
)
async def test_a_message_is_answered_once_wherever_its_node_dies(
    point: str, option: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    script = streams(*ANSWER) if option == "none" else continues(*ANSWER)
    async with (
        scripted_backend(always=script) as backend,
        one_node(
            tmp_path, redis_server, backend.url, crash_at=point, flush_interval="20ms", ai_continue=option
        ) as node,
    ):
        if point == "flushed":  # slow enough that the first text is recorded alone
            backend.then(hangs(event(chunk(ANSWER[0]))))
        async with node.peer(USER) as someone:
            await someone.send_frame("CHAT", userId=USER, contents="hello", messageId="m1")
            await _until_it_breaks(someone)
        assert await node.died() == -9
        told = someone.told.get("m1", Told())

        await node.start()
        async with node.peer(USER) as someone:
            # The client cannot know whether it was accepted, so it sends the same message again.
            assert (await someone.chat(USER, "hello", "m1"))["event"] == "accepted"
            again = await someone.end_of("m1")
        await node.settled()

        assert again.text == "".join(ANSWER)
        assert again.terminal is not None
        assert again.terminal["event"] == "done"
        assert node.recorded(USER, "m1") == ("done", again.text)
        if told.terminal is not None:
            assert told.text == again.text
        # The AI is not called again for a recorded answer, and only once more for an unfinished one.
        assert len(backend.requests) == (
            1 if point in {"begun", "admitted", "delivered", "opened", *AFTER_THE_END} else 2
        )
