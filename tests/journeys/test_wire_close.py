"""How a node refuses or closes a socket: the texts for people, and the codes for clients."""

import asyncio
import json
from collections.abc import Iterator

import pytest
from websockets.exceptions import InvalidStatus

from imstream.codes import CloseCode
from tests.support.one_node import OneNode, standing_node
from tests.support.peer import peer
from tests.support.processes import http_status
from tests.support.servers import DemoBackend
from tests.support.users import user_id

USER = user_id(10001)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[OneNode]:
    """A node with short timeouts, and English texts by default."""
    limits = {
        "init_timeout": "2s",
        "idle_timeout": "2500ms",
        "heartbeat": "700ms",
        "max_frame": 4096,
        "language": "en",
    }
    with standing_node(tmp_path_factory.mktemp("close"), demo.url, **limits) as node:
        yield node


@pytest.mark.parametrize("path", ["/", "/nowhere", "/ws/", "/wss", "/readyz"])
async def test_a_handshake_for_another_path_is_answered_with_404(path: str, node: OneNode) -> None:
    address = node.now.ws(USER)
    with pytest.raises(InvalidStatus) as refused:
        async with peer(address.replace("/ws?", f"{path}?")):
            pass
    assert refused.value.response.status_code == 404
    assert refused.value.response.body == b"WebSockets are served at /ws"


async def test_a_request_that_is_no_handshake_gets_426_or_404(node: OneNode) -> None:
    assert await asyncio.to_thread(http_status, f"{node.now.http}/nowhere") == 404
    assert await asyncio.to_thread(http_status, f"{node.now.http}/ws?userId=10001") == 426


@pytest.mark.parametrize(("lang", "text"), [(None, f"User id {USER}: logged in"), ("zh", f"用户标识: {USER} 登录成功")])
async def test_a_client_that_asks_for_no_language_gets_that_of_the_node(
    lang: str | None, text: str, node: OneNode
) -> None:
    async with node.peer(USER, lang=lang) as someone:
        assert someone.frames[0]["contents"] == text


@pytest.mark.parametrize(
    ("lang", "text"),
    [("zh", "没有及时登录,连接已断开"), ("en", "No login (INIT) in time, the connection was closed")],
)
async def test_who_does_not_log_in_in_time_is_closed_with_4500_heartbeats_or_not(
    lang: str, text: str, node: OneNode
) -> None:
    async with peer(node.now.ws(USER), lang=lang) as someone:
        await someone.send("PING")
        assert (await someone.frame())["msgType"] == "HEARTBEAT"
        assert await someone.closed() == 4500
    assert (someone.frames[-1]["msgType"], someone.frames[-1]["contents"]) == ("SYSTEM", text)


@pytest.mark.parametrize(
    ("lang", "text"),
    [("zh", "长时间没有收到心跳,连接已断开"), ("en", "No heartbeat for a long time, the connection was closed")],
)
async def test_who_falls_silent_is_closed_with_4001_and_may_come_back(lang: str, text: str, node: OneNode) -> None:
    async with node.peer(USER, lang=lang) as someone:
        assert await someone.closed() == 4001
    assert someone.connection.close_reason == CloseCode.NO_HEARTBEAT.reason
    assert (someone.frames[-1]["msgType"], someone.frames[-1]["contents"]) == ("SYSTEM", text)
    async with node.peer(USER) as someone:
        await someone.send("PING")
        assert (await someone.frame())["msgType"] == "HEARTBEAT"


async def test_heartbeats_keep_a_socket_open_and_an_answer_alone_does_not(node: OneNode) -> None:
    question = "on and on [[demo first=0 pace=50ms length=200]]"  # 10 s
    async with node.peer(USER) as beating, node.peer(USER) as silent:

        async def beat() -> None:
            while len(beating.told["beating"].events) < 100:  # twice the idle timeout
                await beating.until(messageId="beating")
                await beating.send("PING")

        await beating.chat(USER, question, "beating")
        await silent.chat(USER, f"another, {question}", "silent")
        code, _ = await asyncio.gather(silent.closed(), beat())
        assert code == 4001
        for message_id in ("beating", "silent"):
            await beating.send_frame("CANCEL", messageId=message_id)
        assert (await beating.end_of("beating")).events[-1] == "cancelled"


async def test_a_frame_that_is_too_big_is_closed_with_1009(node: OneNode) -> None:
    short = "[[demo first=0 length=1]]"

    def chat(size: int) -> str:
        frame = {"msgType": "CHAT", "userId": USER, "messageId": f"m{size}", "contents": short}
        frame["contents"] = short + "x" * (size - len(json.dumps(frame)))
        return json.dumps(frame)

    async with node.peer(USER) as someone:
        await someone.send(chat(4096))
        assert (await someone.end_of("m4096")).events[-1] == "done"
        await someone.send(chat(4097))
        assert await someone.closed() == 1009
