"""The browser client in a real Chromium, against a scripted server."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from imstream.wire import ClientHeartbeat, ResumePoint, Turn
from tests.journeys.page_support import Page, open_page
from tests.support.scripted_ws import Peer, ScriptedServer
from tests.support.tcp_proxy import tcp_proxy
from tests.support.users import query, user_id
from tests.support.waiting import SLOW, wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

USER = user_id(10001)
EVENTS = [
    *("accepted", "delta", "restart", "done", "failed", "cancelled", "expired", "refused", "notice"),
    *("status", "asked", "thinking"),
]
QUICK = {"firstWait": 20, "longestWait": 100}
MODULE = (resources.files("imstream.gateway") / "static" / "imstream.js").read_bytes()


class BrowserClient:
    """An `ImstreamClient` in a page, and its server. Messages are named by their id."""

    def __init__(self, page: Page, server: ScriptedServer) -> None:
        self.page = page
        self.server = server

    async def make(self, **options: Any) -> None:  # noqa: ANN401 - options of the client
        """Make the client."""
        given = {"address": f"http://127.0.0.1:{self.server.port}/", "userId": USER, **QUICK, **options}
        await self.page.evaluate(
            f"""(async () => {{
                Object.assign(globalThis, await import("/imstream.js"));
                globalThis.events = [];
                globalThis.messages = {{}};
                globalThis.client = new ImstreamClient({json.dumps(given)});
                for (const type of ["state", "notice"])
                    client.addEventListener(type, (e) => events.push([type, client.state, e.detail]));
                globalThis.keep = (message) => {{
                    messages[message.id] = message;
                    for (const type of {json.dumps(EVENTS)})
                        message.addEventListener(type, () => events.push([message.id, type, message.status]));
                }};
            }})()"""
        )

    async def start(self, **options: Any) -> None:  # noqa: ANN401 - options of the client
        """Make the client and let it connect."""
        await self.make(**options)
        await self.page.evaluate("client.connect()")

    async def logged_in(self, **options: Any) -> Peer:  # noqa: ANN401 - options of the client
        """Make the client and let it log in."""
        await self.start(**options)
        return await self.server.logged_in(node="7")

    async def send(self, name: str, text: str = "hello", history: list[dict[str, str]] | None = None) -> None:
        """Send a message."""
        await self.page.evaluate(f"keep(client.send({json.dumps(text)}, {json.dumps(history or [])}, '{name}'))")

    async def status(self, name: str, wanted: str, text: str | None = None) -> None:
        """Wait until a message has this status and this text."""
        condition = f"messages.{name}.status === '{wanted}'"
        if text is not None:
            condition += f" && messages.{name}.text === {json.dumps(text)}"
        await self.page.until(condition)

    async def events(self, name: str) -> list[str]:
        """Return the events of one message so far."""
        script = f"events.filter(([id]) => id === '{name}').map(([, type]) => type)"
        happened: list[str] = await self.page.evaluate(script)
        return happened

    async def state(self, wanted: str) -> None:
        """Wait until the connection has this state."""
        await self.page.until(f"client.state === '{wanted}'")


@asynccontextmanager
async def browser_client(chromium: str) -> AsyncIterator[BrowserClient]:
    def serve_module(socket: ServerConnection, request: Request) -> Response | None:
        if request.path.startswith("/ws"):
            return server.refuse(socket, request)
        body, kind = (MODULE, "text/javascript") if request.path == "/imstream.js" else (b"", "text/html")
        return Response(200, "OK", Headers({"Content-Type": kind, "Content-Length": str(len(body))}), body)

    server = ScriptedServer()
    async with (
        serve(server.handle, "127.0.0.1", 0, close_timeout=1, process_request=serve_module) as listener,
        open_page(chromium) as page,
    ):
        server.port = listener.sockets[0].getsockname()[1]
        await page.visit(f"http://127.0.0.1:{server.port}/blank")
        yield BrowserClient(page, server)


@pytest.fixture
async def browser(chromium: str) -> AsyncIterator[BrowserClient]:
    async with browser_client(chromium) as client:
        yield client
        assert not [words for words in client.page.complaints if "WebSocket" not in words]


async def test_logs_in_and_sends_what_waited_for_the_connection(browser: BrowserClient) -> None:
    await browser.start(token="signed", lang="en")  # noqa: S106 - an example
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    await browser.send("m1", "how are you?", history)
    peer = await browser.server.peer()
    init = await peer.hear_init()
    assert peer.path == f"/ws?{query(USER)}&lang=en"
    assert (init.user_id, init.token, init.resume) == (USER, "signed", [])
    await peer.send_frame("INIT", node="7")
    chat = await peer.hear_chat()
    assert (chat.message_id, chat.contents) == ("m1", "how are you?")
    assert chat.history == [Turn(role="user", content="hi"), Turn(role="assistant", content="hello")]
    assert chat.traceparent is None
    trace = f"00-{'1' * 32}-{'2' * 16}-01"
    await browser.page.evaluate(f"keep(client.send('why?', [], 'm2', {{ traceparent: '{trace}' }}))")
    assert (await peer.hear_chat()).traceparent == trace
    await browser.state("online")
    assert await browser.page.evaluate("client.node") == "7"


async def test_shows_the_answer_of_a_message_that_had_failed(browser: BrowserClient) -> None:
    peer = await browser.logged_in(wants=["asked"])
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "accepted", position=1)
    await peer.send_chat("m1", "delta", attempt=1, offset=4, contents="half")
    await peer.send_chat("m1", "failed", code="AI_FAILED", attempt=1, offset=4)
    await browser.status("m1", "failed", "half")
    await browser.page.evaluate("client.addEventListener('asked', () => events.push(['m1', 'shown twice']))")
    await peer.send_chat("m1", "asked", contents="hello")
    await peer.send_chat("m1", "delta", attempt=1, offset=8, contents="late")
    await peer.send_chat("m1", "restart", attempt=2, offset=0)
    await browser.status("m1", "answering", "")
    await peer.send_chat("m1", "delta", attempt=2, offset=4, contents="Blue")
    await peer.send_chat("m1", "done", attempt=2, offset=4)
    await browser.status("m1", "done", "Blue")
    assert await browser.page.evaluate("messages.m1.ended.then(({ text }) => text)") == "Blue"
    assert await browser.events("m1") == ["accepted", "delta", "failed", "restart", "delta", "done"]
    await peer.send_chat("m1", "restart", attempt=3, offset=0)  # no server does this
    await browser.send("m2")
    await peer.send_chat("m2", "accepted", position=1)
    await browser.status("m2", "queued")
    assert await browser.page.evaluate("messages.m1.status") == "done"


async def test_puts_an_answer_together(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "accepted", position=3, node="7")
    await browser.status("m1", "queued")
    assert await browser.page.evaluate("[messages.m1.position, messages.m1.node]") == [3, "7"]
    await peer.send_chat("m1", "delta", attempt=1, offset=4, contents="Blue")
    await browser.status("m1", "answering", "Blue")
    await peer.send_chat("m1", "delta", attempt=1, offset=6, contents="! ")
    await peer.send_chat("m1", "done", attempt=1, offset=6, finish_reason="stop", usage={"completion_tokens": 2})
    await browser.status("m1", "done", "Blue! ")
    ended = await browser.page.evaluate("messages.m1.ended.then((m) => [m.id, m.frame.usage.completion_tokens])")
    assert ended == ["m1", 2]
    assert await browser.events("m1") == ["accepted", "delta", "delta", "done"]


async def test_what_is_known_or_outdated_changes_nothing(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "delta", attempt=2, offset=5, contents="seven")
    await peer.send_chat("m1", "delta", attempt=2, offset=5, contents="seven")
    await peer.send_chat("m1", "delta", attempt=2, offset=3, contents="sev")
    await peer.send_chat("m1", "delta", attempt=1, offset=9, contents="forgotten")
    await peer.send_chat("m1", "accepted", position=1)
    await peer.send_chat("m1", "done", attempt=2, offset=5)
    await peer.send_chat("m1", "delta", attempt=2, offset=9, contents="late")
    await peer.send_frame("HEARTBEAT")
    await browser.status("m1", "done", "seven")
    assert await browser.events("m1") == ["delta", "accepted", "done"]
    assert await browser.page.evaluate("events.find(([, type]) => type === 'accepted')[2]") == "answering"


async def test_an_answer_that_is_sent_again_from_its_beginning_is_shown_once(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "delta", attempt=1, offset=4, contents="the ")
    await peer.send_chat("m1", "accepted", position=1)
    await peer.send_chat("m1", "delta", attempt=1, offset=7, contents="the 𝒶𝓃𝓈")
    await peer.send_chat("m1", "delta", attempt=1, offset=10, contents="𝓌er")
    await browser.status("m1", "answering", "the 𝒶𝓃𝓈𝓌er")


@pytest.mark.parametrize("attempt", [1, 2])
async def test_restart_discards_the_text(browser: BrowserClient, attempt: int) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "delta", attempt=1, offset=5, contents="wrong")
    await peer.send_chat("m1", "restart", attempt=attempt, offset=0, contents="once more")
    await browser.status("m1", "answering", "")
    await peer.send_chat("m1", "delta", attempt=attempt, offset=4, contents="true")
    await browser.status("m1", "answering", "true")


async def test_a_later_attempt_discards_the_text_by_itself(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "delta", attempt=1, offset=5, contents="wrong")
    await peer.send_chat("m1", "delta", attempt=2, offset=4, contents="true")
    await browser.status("m1", "answering", "true")


async def test_what_was_not_acknowledged_is_sent_again_under_its_id(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1", "first")
    await peer.hear_chat()
    peer.drop()
    again = await browser.server.peer()
    assert (await again.hear_init()).resume == []
    await again.send_frame("INIT")
    chat = await again.hear_chat()
    assert (chat.message_id, chat.contents) == ("m1", "first")


async def test_an_accepted_message_is_resumed_where_it_stood(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "accepted", position=1)
    await peer.send_chat("m1", "delta", attempt=2, offset=120, contents="one ")
    await browser.status("m1", "answering", "one ")
    peer.drop()
    again = await browser.server.peer()
    assert (await again.hear_init()).resume == [ResumePoint(message_id="m1", attempt=2, offset=120)]
    await again.send_frame("INIT")
    await again.send_chat("m1", "delta", attempt=2, offset=123, contents="two")
    await again.send_chat("m1", "done", attempt=2, offset=123)
    await browser.status("m1", "done", "one two")
    again.drop()
    assert (await (await browser.server.peer()).hear_init()).resume == []


async def test_a_message_of_an_earlier_page_is_followed_from_its_start(browser: BrowserClient) -> None:
    await browser.make()
    await browser.page.evaluate("keep(client.follow('m1', 'hello')); client.connect()")
    peer = await browser.server.peer()
    assert (await peer.hear_init()).resume == [ResumePoint(message_id="m1", attempt=0, offset=0)]
    await peer.send_frame("INIT")
    await peer.send_chat("m1", "delta", attempt=1, offset=5, contents="whole")
    await peer.send_chat("m1", "done", attempt=1, offset=5)
    await browser.status("m1", "done", "whole")


async def test_a_message_that_is_followed_during_the_login_is_resumed_after_it(browser: BrowserClient) -> None:
    await browser.start()
    peer = await browser.server.peer()
    assert (await peer.hear_init()).resume == []
    await browser.page.evaluate("keep(client.follow('m1', 'hello'))")
    await peer.send_frame("INIT")
    assert (await peer.hear_init()).resume == [ResumePoint(message_id="m1", attempt=0, offset=0)]
    await peer.send_frame("INIT")
    await peer.send_chat("m1", "delta", attempt=1, offset=5, contents="whole")
    await peer.send_chat("m1", "done", attempt=1, offset=5)
    await browser.status("m1", "done", "whole")


async def test_an_expired_reply_is_told(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "accepted", position=1)
    await browser.status("m1", "queued")
    peer.drop()
    again = await browser.server.logged_in()
    await again.send_frame("CHAT", message_id="m1", code="EXPIRED", contents="expired")
    await browser.status("m1", "expired")


async def test_expired_for_what_never_arrived_sends_it_again(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_frame("CHAT", message_id="m1", code="EXPIRED")
    assert (await peer.hear_chat()).message_id == "m1"


async def test_a_refused_message_can_be_sent_again(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_frame("SYSTEM", code="BUSY", message_id="m1", retry_after_ms=1500)
    await browser.status("m1", "refused")
    assert await browser.page.evaluate("messages.m1.frame.retryAfterMs") == 1500
    await browser.page.evaluate("client.resend(messages.m1)")
    assert (await peer.hear_chat()).message_id == "m1"
    await peer.send_chat("m1", "accepted", position=1)
    await browser.status("m1", "queued")


async def test_a_refused_message_is_not_sent_by_itself(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_frame("SYSTEM", code="BUSY", message_id="m1", retry_after_ms=1500)
    await browser.status("m1", "refused")
    peer.drop()
    again = await browser.server.peer()
    assert (await again.hear_init()).resume == []
    await again.send_frame("INIT")
    await browser.send("m2")
    assert (await again.hear_chat()).message_id == "m2"


async def test_a_frame_that_could_not_be_read_refuses_the_oldest_unanswered_message(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await browser.send("m2")
    await browser.send("m3")
    await peer.send_chat("m1", "accepted", position=1)
    await peer.send_frame("SYSTEM", code="BAD_REQUEST", contents="history: wrong")
    await peer.send_chat("m3", "accepted", position=2)
    await browser.status("m3", "queued")
    await browser.status("m2", "refused")


async def test_a_running_message_is_cancelled(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "delta", attempt=1, offset=4, contents="some")
    await browser.status("m1", "answering")
    await browser.page.evaluate("client.cancel('m1')")
    assert (await peer.hear_cancel()).message_id == "m1"
    await peer.send_chat("m1", "cancelled", attempt=1, offset=4)
    await browser.status("m1", "cancelled", "some")


async def test_a_cancel_outlives_a_lost_connection(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "accepted", position=1)
    await browser.status("m1", "queued")
    await browser.page.evaluate("client.drop(); client.cancel('m1')")
    again = await browser.server.peer()
    assert [point.message_id for point in (await again.hear_init()).resume] == ["m1"]
    await again.send_frame("INIT")
    assert (await again.hear_cancel()).message_id == "m1"
    await again.send_frame("SYSTEM", code="UNKNOWN", message_id="m1")
    await browser.status("m1", "cancelled")


async def test_cancelling_what_was_never_sent_needs_no_server(browser: BrowserClient) -> None:
    await browser.start()
    await browser.send("m1")
    await browser.page.evaluate("client.cancel('m1')")
    await browser.status("m1", "cancelled")
    peer = await browser.server.logged_in()
    await browser.send("m2")
    assert (await peer.hear_chat()).message_id == "m2"


async def test_a_cancel_that_came_too_late_is_noticed(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "accepted", position=1)
    await browser.status("m1", "queued")
    await browser.page.evaluate("client.cancel('m1')")
    await peer.hear_cancel()
    await peer.send_frame("SYSTEM", code="TOO_LATE", message_id="m1")
    await peer.send_chat("m1", "done", attempt=1, offset=0)
    await browser.status("m1", "done")
    assert await browser.events("m1") == ["accepted", "notice", "done"]


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012, 1013, 4000, 4001, 4499])
async def test_comes_back_after(browser: BrowserClient, code: int) -> None:
    await (await browser.logged_in()).close(code)
    await (await browser.server.peer()).hear_init()


NUMBERED = "options.token = async () => `token ${++shown}`"
"""Makes the client present another token each time: token 1, token 2."""


async def numbered(browser: BrowserClient) -> None:
    """Make the client present such tokens, and let it connect."""
    await browser.make()
    await browser.page.evaluate(f"(globalThis.shown = 0, client.{NUMBERED}, client.connect(), null)")


async def refuse(peer: Peer) -> str | None:
    """Refuse the login; return the token presented."""
    init = await peer.hear_init()
    await peer.send_frame("SYSTEM", code="UNAUTHORIZED", contents="not valid")
    await peer.close(4500)
    return init.token


async def test_a_login_that_is_about_to_end_is_prolonged_with_a_fresh_token(browser: BrowserClient) -> None:
    await numbered(browser)
    peer = await browser.server.peer()
    assert (await peer.hear_init()).token == "token 1"  # noqa: S105 - no secret
    await peer.send_frame("INIT")
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "accepted", position=1)
    await peer.send_frame("SYSTEM", code="UNAUTHORIZED", contents="your login ends in 30 s")
    init = await peer.hear_init()
    assert (init.token, init.resume) == ("token 2", [])
    await peer.send_frame("INIT")
    await peer.send_chat("m1", "done", attempt=1, offset=0)
    await browser.status("m1", "done")


async def test_after_the_end_of_its_login_it_comes_back_with_a_fresh_token_and_resumes(browser: BrowserClient) -> None:
    await numbered(browser)
    for number in (1, 2, 3):
        peer = await browser.server.peer()
        init = await peer.hear_init()
        assert init.token == f"token {number}"
        await peer.send_frame("INIT")
        if number == 1:
            await browser.send("m1")
            await peer.hear_chat()
            await peer.send_chat("m1", "accepted", position=1)
            await browser.status("m1", "queued")
        else:
            assert [point.message_id for point in init.resume] == ["m1"]
        await browser.state("online")
        await peer.close(4500)


async def test_a_token_that_came_too_late_for_a_login_that_ends_is_shown_again(browser: BrowserClient) -> None:
    await browser.make()
    give = "() => (shown++ ? 'new' : 'old')"
    await browser.page.evaluate(f"(globalThis.shown = 0, client.options.token = {give}, client.connect(), null)")
    peer = await browser.server.logged_in()
    await browser.state("online")
    await peer.send_frame("SYSTEM", code="UNAUTHORIZED", contents="your login has expired")
    assert (await peer.hear_init()).token == "new"  # noqa: S105 - no secret
    await peer.close(4500)
    peer = await browser.server.peer()
    assert (await peer.hear_init()).token == "new"  # noqa: S105 - no secret
    await peer.send_frame("INIT")
    await browser.state("online")


async def test_two_fresh_tokens_that_are_refused_are_enough(browser: BrowserClient) -> None:
    await numbered(browser)
    assert [await refuse(await browser.server.peer()) for _ in range(2)] == ["token 1", "token 2"]
    await browser.state("closed")


async def test_a_token_that_was_refused_is_not_shown_again_unless_somebody_asks(browser: BrowserClient) -> None:
    await browser.make()
    await browser.page.evaluate("(client.options.token = () => 'stale', client.connect(), null)")
    assert await refuse(await browser.server.peer()) == "stale"
    await (await browser.server.peer()).gone()
    await browser.state("closed")
    await browser.page.evaluate("client.connect()")
    assert (await browser.server.logged_in()) is not None


async def test_when_nobody_can_be_let_in_now_it_tries_again(browser: BrowserClient) -> None:
    await browser.start()
    peer = await browser.server.peer()
    await peer.hear_init()
    await peer.send_frame("SYSTEM", code="UNAVAILABLE", contents="try later")
    await peer.gone()
    await browser.server.logged_in()
    await browser.state("online")


async def test_without_a_token_it_tries_again(browser: BrowserClient) -> None:
    await browser.make()
    give = "() => { if (!globalThis.tried) { globalThis.tried = true; throw new Error('away'); } return 'signed'; }"
    await browser.page.evaluate(f"(client.options.token = {give}, client.connect(), null)")
    await (await browser.server.peer()).gone()
    assert (await (await browser.server.peer()).hear_init()).token == "signed"  # noqa: S105 - no secret


async def test_reports_the_reason_of_a_close_only_if_the_server_sent_one(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await peer.send_frame("SYSTEM", code="DRAINING", contents="we restart")
    await peer.close(1012, "restart")
    peer = await browser.server.logged_in()
    await peer.send_frame("SYSTEM", code="RATE_LIMITED", contents="slower, please")
    await peer.close(1009, "too many fragments")
    peer = await browser.server.logged_in()
    await peer.send_frame("SYSTEM", code="RATE_LIMITED", contents="slower, please")
    await peer.send_frame("HEARTBEAT")
    await peer.close(4001, "silence")
    await browser.server.logged_in()
    waits = "events.filter(([, state]) => state === 'waiting').map(([, , e]) => [e.code, e.reason, e.frame?.contents])"
    assert await browser.page.evaluate(waits) == [
        [1012, "restart", "we restart"],
        [1009, "too many fragments", None],
        [4001, "silence", None],
    ]


async def test_a_login_that_came_too_late_is_no_fault_of_its_token(browser: BrowserClient) -> None:
    await browser.start(token="signed")  # noqa: S106 - no secret
    for _ in range(2):
        peer = await browser.server.peer()
        assert (await peer.hear_init()).token == "signed"  # noqa: S105 - no secret
        await peer.send_frame("SYSTEM", code="INIT_TIMEOUT", contents="no login in time")
        await peer.close(4500)
    await browser.server.logged_in()
    await browser.state("online")


async def test_an_invalid_message_of_several_is_refused_by_its_id(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    for name in ("m1", "m2", "m3"):
        await browser.send(name)
        await peer.hear_chat()
    await peer.send_frame("SYSTEM", code="BAD_REQUEST", message_id="m2", contents="contents: too long")
    await browser.status("m2", "refused")
    assert await browser.page.evaluate("[messages.m1.status, messages.m3.status]") == ["sending"] * 2


async def test_an_event_of_a_newer_server_changes_nothing(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "rated", attempt=1, offset=7, contents="well")
    await peer.close(4000)
    assert (await (await browser.server.peer()).hear_init()).resume == []  # it is not accepted yet


@pytest.mark.parametrize("code", [4500, 4502, 4999])
async def test_stays_away_after(browser: BrowserClient, code: int) -> None:
    peer = await browser.logged_in()
    await peer.send_frame("SYSTEM", code="REPLACED", contents="because")
    await peer.close(code, "newer login")
    await browser.state("closed")
    events = await browser.page.evaluate("events.slice(-2)")
    assert events[0][2]["contents"] == "because"
    assert events[1] == ["state", "closed", {"code": code, "reason": "newer login", "frame": events[0][2]}]


async def test_the_longest_message_is_what_was_too_big(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1", "short")
    await browser.send("m2", "long" * 1000)
    await peer.close(1009)
    again = await browser.server.logged_in()
    assert (await again.hear_chat()).message_id == "m1"
    await browser.status("m2", "refused")


async def test_waits_grow_and_are_scattered(browser: BrowserClient) -> None:
    await browser.logged_in()
    waits = "Array.from({length: 200}, () => reconnectWait(%s, %s, 1000, 30000))"
    for failures in range(8):
        values = await browser.page.evaluate(waits % (1006, failures))
        top = min(30_000, 1000 * 2**failures)
        assert top / 2 <= min(values) < max(values) <= top
        assert max(values) - min(values) > top / 4
    assert max(await browser.page.evaluate(waits % (1012, 0))) <= 500
    assert min(await browser.page.evaluate(waits % (1012, 1))) >= 1000
    assert min(await browser.page.evaluate(waits % (1013, 0))) >= 2500


async def test_a_server_that_is_not_ready_is_asked_again_soon(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.state("online")
    browser.server.refusals = 2
    await peer.close(1012)
    await browser.server.logged_in()
    await browser.state("online")
    assert browser.server.refusals == 0


async def test_waits_start_small_again_after_a_steady_connection(browser: BrowserClient) -> None:
    waits = "events.filter(([, state]) => state === 'waiting').map(([, , { wait }]) => wait)"
    peer = await browser.logged_in(firstWait=100, longestWait=10_000)
    for _ in range(2):
        peer.drop()
        peer = await browser.server.logged_in()
    await browser.state("online")
    await browser.page.evaluate("{ const now = Date.now; Date.now = () => now() + 10_000 }")
    peer.drop()
    await browser.server.logged_in()
    first, second, third = await browser.page.evaluate(waits)
    assert first <= 100 <= second
    assert third <= 100


async def test_comes_back_at_once_when_the_network_does(browser: BrowserClient) -> None:
    peer = await browser.logged_in(firstWait=3_600_000, longestWait=3_600_000)
    peer.drop()
    await browser.state("waiting")
    await browser.page.evaluate("dispatchEvent(new Event('online'))")
    await browser.server.logged_in()
    await browser.state("online")


async def test_a_message_sent_into_a_dead_socket_arrives_soon(browser: BrowserClient) -> None:
    async with tcp_proxy(browser.server.port) as proxy:
        await browser.logged_in(address=f"http://127.0.0.1:{proxy.port}/", firstWait=1000, longestWait=30_000)
        await browser.state("online")
        proxy.swallow()
        began = asyncio.get_running_loop().time()
        await browser.send("m1")
        await wait_until(lambda: proxy.swallowed, "the message is lost")
        proxy.forward()
        peer = await browser.server.logged_in()
        assert (await peer.hear_chat()).message_id == "m1"
        assert asyncio.get_running_loop().time() - began < 5 * SLOW  # 4 s: the heartbeat's, and up to 1 s of backoff
        await peer.send_chat("m1", "done", attempt=1, offset=0)
        await browser.status("m1", "done")


async def test_a_cancel_sent_into_a_dead_socket_arrives_soon(browser: BrowserClient) -> None:
    async with tcp_proxy(browser.server.port) as proxy:
        peer = await browser.logged_in(address=f"http://127.0.0.1:{proxy.port}/", probeLimit=1_500)
        await browser.send("m1")
        await peer.hear_chat()
        await peer.send_frame("HEARTBEAT")
        await peer.send_chat("m1", "accepted", position=1)
        await browser.status("m1", "queued")
        proxy.swallow()
        await browser.page.evaluate("client.cancel('m1')")
        await wait_until(lambda: proxy.swallowed, "the cancel is lost")
        proxy.forward()
        assert (await (await browser.server.logged_in()).hear_cancel()).message_id == "m1"


@pytest.mark.parametrize("event", ["online", "pageshow", "focus", "visibilitychange"])
async def test_a_page_that_wakes_up_checks_its_connection(browser: BrowserClient, event: str) -> None:
    peer = await browser.logged_in(probeLimit=1_500)
    await browser.state("online")
    wake = f"dispatchEvent(new Event('{event}'))"
    await browser.page.evaluate(wake)
    assert isinstance(await peer.hear_anything(), ClientHeartbeat)
    await peer.send_frame("HEARTBEAT")
    await browser.page.until("new Promise((resolve) => setTimeout(() => resolve(client.state === 'online'), 2_000))")
    await browser.page.evaluate(f"{wake}; {wake}")
    assert isinstance(await peer.hear_anything(), ClientHeartbeat)
    await peer.gone()  # it was not answered in time
    await browser.server.logged_in()


@pytest.mark.parametrize("event", ["online", "focus"])
async def test_a_page_that_wakes_up_does_not_wait_for_an_attempt_of_before(browser: BrowserClient, event: str) -> None:
    async with tcp_proxy(browser.server.port) as proxy:
        proxy.swallow()
        never = dict.fromkeys(("patience", "firstWait", "longestWait"), 3_600_000)
        await browser.start(address=f"http://127.0.0.1:{proxy.port}/", **never)
        await wait_until(lambda: proxy.swallowed, "the handshake is lost")
        proxy.forward()
        if event == "focus":  # which happens often: only if the attempt should have ended long ago
            await browser.page.evaluate("{ const now = Date.now; Date.now = () => now() + 3_600_001 }")
        await browser.page.evaluate(f"dispatchEvent(new Event('{event}'))")
        await browser.server.logged_in()
        await browser.state("online")


async def test_an_attempt_that_has_begun_just_now_goes_on_when_the_page_wakes_up(browser: BrowserClient) -> None:
    await browser.start()
    peer = await browser.server.peer()
    await browser.page.evaluate("dispatchEvent(new Event('focus'))")
    await peer.hear_init()
    await peer.send_frame("INIT")
    await browser.state("online")
    assert await browser.page.evaluate("events.filter(([type]) => type === 'state').length") == 2


async def test_invalid_frames_are_ignored(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    for data in ("<html>", "null", "[]", b"binary"):
        await peer.socket.send(data)
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "done", attempt=1, offset=0)
    await browser.status("m1", "done")


async def test_a_requested_connection_does_not_wait_for_earlier_failures(browser: BrowserClient) -> None:
    waits = "events.filter(([, state]) => state === 'waiting').map(([, , { wait }]) => wait)"
    browser.server.refusals = 3
    await browser.start(firstWait=50, longestWait=10_000)
    await wait_until(lambda: browser.server.refusals == 0, "it has failed")
    peer = await browser.server.logged_in()
    await browser.page.evaluate("(client.close(), client.connect(), null)")
    await peer.gone()
    (await browser.server.logged_in()).drop()
    await browser.server.logged_in()
    assert (await browser.page.evaluate(waits))[-1] <= 50


async def test_a_hidden_page_and_one_that_was_closed_check_nothing(browser: BrowserClient) -> None:
    peer = await browser.logged_in(heartbeat=3_600_000)
    await browser.state("online")
    hide = "Object.defineProperty(document, 'visibilityState', { value: 'hidden', configurable: true })"
    count = """{
        globalThis.sent = 0;
        const { send } = WebSocket.prototype;
        WebSocket.prototype.send = function (text) { sent++; send.call(this, text); };
    }"""
    await browser.page.evaluate(count)
    await browser.page.evaluate(f"({hide}, dispatchEvent(new Event('focus')), delete document.visibilityState)")
    assert await browser.page.evaluate("sent") == 0
    await browser.page.evaluate("dispatchEvent(new Event('focus'))")
    assert await browser.page.evaluate("sent") == 1
    await browser.page.evaluate("client.close(); dispatchEvent(new Event('online'))")
    await peer.gone()
    assert await browser.page.evaluate("client.state") == "closed"


async def test_a_server_that_is_busy_with_a_message_is_not_taken_for_dead(browser: BrowserClient) -> None:
    peer = await browser.logged_in(probeLimit=1_500)
    await browser.state("online")
    await browser.send("m1")
    frames = [await peer.hear_anything() for _ in range(2)]
    await peer.send_frame("HEARTBEAT")
    await browser.page.until("new Promise((resolve) => setTimeout(() => resolve(client.state === 'online'), 2_000))")
    await browser.send("m2")
    await browser.page.evaluate("dispatchEvent(new Event('focus'))")
    frames.append(await peer.hear_anything())
    assert [frame.msg_type for frame in frames] == ["HEARTBEAT", "CHAT", "CHAT"]


async def test_a_long_answer_before_that_of_the_heartbeat_is_a_sign_of_life(browser: BrowserClient) -> None:
    peer = await browser.logged_in(probeLimit=2_000)
    await browser.state("online")
    await browser.send("m1")
    await peer.hear_chat()
    for offset in range(1, 5):
        await browser.page.evaluate("new Promise((resolve) => setTimeout(resolve, 600))")
        await peer.send_chat("m1", "delta", attempt=1, offset=offset, contents="x")
    await browser.status("m1", "answering", "xxxx")
    await peer.send_frame("HEARTBEAT")
    await peer.send_chat("m1", "done", attempt=1, offset=4)
    await browser.status("m1", "done")
    assert await browser.page.evaluate("events.filter(([type]) => type === 'state').length") == 2


async def test_reports_states_and_reasoning_if_they_are_requested(browser: BrowserClient) -> None:
    await browser.start(wants=["status", "thinking"])
    peer = await browser.server.peer()
    assert (await peer.hear_init()).wants == ["status", "thinking"]
    await peer.send_frame("INIT")
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "accepted", position=2)
    await peer.send_chat("m1", "status", state="queued", position=1, eta_ms=1500)
    await browser.page.until("messages.m1.state === 'queued' && messages.m1.position === 1")
    for start, text in ((0, "Hm"), (0, "Let me "), (7, "see")):
        await peer.send_chat("m1", "thinking", attempt=1, contents=text, start=start)
    await browser.page.until("messages.m1.thinking === 'Let me see'")
    await peer.send_chat("m1", "restart", attempt=2, offset=0, contents="once more")
    await browser.status("m1", "answering", "")
    assert await browser.page.evaluate("messages.m1.thinking") == ""
    assert await browser.events("m1") == ["accepted", "status", *["thinking"] * 3, "restart"]


async def test_a_status_is_no_acceptance(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "status", state="queued")
    await peer.socket.send('{"code": "SUCCESS", "respTime": "1", "msgType": "NEWS", "messageId": "m1"}')
    await browser.page.until("messages.m1.state === 'queued'")
    peer.drop()
    assert (await (await browser.server.logged_in()).hear_chat()).message_id == "m1"


async def test_follows_messages_of_other_sockets_if_they_are_wanted(browser: BrowserClient) -> None:
    await browser.make(wants=["asked"])
    await browser.page.evaluate(
        "(client.addEventListener('asked', ({ detail }) => keep(detail)), client.connect(), null)"
    )
    peer = await browser.server.peer()
    await peer.hear_init()
    await peer.send_frame("INIT", messages=[{"message_id": "m1", "state": "done"}])
    await browser.page.until("client.known.length")
    await browser.page.evaluate("for (const { messageId } of client.known) keep(client.follow(messageId))")
    assert [point.message_id for point in (await peer.hear_init()).resume] == ["m1"]
    await peer.send_frame("INIT")
    await peer.send_chat("m1", "asked", contents="Why?")
    await peer.send_chat("m1", "delta", attempt=1, offset=4, contents="Blue")
    await peer.send_chat("m1", "done", attempt=1, offset=4)
    await browser.status("m1", "done", "Blue")
    await peer.send_chat("m2", "asked", contents="How?")
    await peer.send_chat("m2", "delta", attempt=1, offset=2, contents="So")
    await browser.status("m2", "answering", "So")
    assert await browser.page.evaluate("[messages.m1.contents, messages.m2.contents]") == ["Why?", "How?"]


async def test_text_that_cannot_be_encoded_is_replaced_before_it_is_sent(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.page.evaluate(r"keep(client.send('half \ud83c and whole \ud83c\udf0a', [], 'm1'))")
    assert (await peer.hear_chat()).contents == "half \ufffd and whole 🌊"


async def test_a_silent_server_is_left(browser: BrowserClient) -> None:
    peer = await browser.logged_in(heartbeat=1_000)  # this process may need some of it for an answer
    assert isinstance(await peer.hear_anything(), ClientHeartbeat)
    await peer.send_frame("HEARTBEAT")
    assert isinstance(await peer.hear_anything(), ClientHeartbeat)
    await peer.gone()
    await (await browser.server.peer()).hear_init()


async def test_beats_as_often_as_the_server_asks_for_it(browser: BrowserClient) -> None:
    await browser.start(heartbeat=3_600_000)
    peer = await browser.server.peer()
    await peer.hear_init()
    await peer.send_frame("INIT", heartbeat_ms=1_500)  # as long as this process may need for an answer
    for _ in range(2):
        assert isinstance(await peer.hear_anything(), ClientHeartbeat)
        await peer.send_frame("HEARTBEAT")


async def test_a_server_that_never_answers_a_login_is_left(browser: BrowserClient) -> None:
    await browser.start(patience=1_000)
    await (await browser.server.peer()).hear_init()
    await (await browser.server.peer()).hear_init()


async def test_a_server_that_cannot_log_anybody_in_is_left_and_asked_again(browser: BrowserClient) -> None:
    await browser.start(patience=60_000)
    peer = await browser.server.peer()
    await peer.hear_init()
    await peer.send_frame("SYSTEM", code="UNAVAILABLE", contents="Not now.", retry_after_ms=50)
    await browser.server.logged_in()
    await browser.state("online")
    assert await browser.page.evaluate("events.find(([type]) => type === 'notice')[2].contents") == "Not now."


async def test_resumes_again_when_the_server_could_not_look(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "accepted", position=1)
    await browser.status("m1", "queued")
    peer.drop()
    again = await browser.server.logged_in()
    await again.send_frame("SYSTEM", code="UNAVAILABLE", message_id="m1", retry_after_ms=50)
    assert [point.message_id for point in (await again.hear_init()).resume] == ["m1"]
    await again.send_frame("INIT")
    await again.send_chat("m1", "delta", attempt=1, offset=4, contents="here")
    await browser.status("m1", "answering", "here")


async def test_cancels_again_when_the_server_could_not(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.send("m1")
    await peer.hear_chat()
    await peer.send_chat("m1", "accepted", position=1)
    await browser.status("m1", "queued")
    await browser.page.evaluate("client.cancel('m1')")
    await peer.hear_cancel()
    await peer.send_frame("SYSTEM", code="UNAVAILABLE", message_id="m1", retry_after_ms=50)
    await peer.hear_init()
    assert (await peer.hear_cancel()).message_id == "m1"


async def test_a_message_that_is_refused_while_it_is_cancelled_is_cancelled(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.state("online")  # earlier, it would be cancelled before it was sent
    await browser.send("m1")
    await browser.page.evaluate("client.cancel('m1')")
    await peer.hear_chat()
    await peer.send_frame("SYSTEM", code="BUSY", message_id="m1", retry_after_ms=50)
    await browser.status("m1", "cancelled")


async def test_leaves_for_good(browser: BrowserClient) -> None:
    peer = await browser.logged_in()
    await browser.page.evaluate("client.close()")
    await peer.gone()
    assert await browser.page.evaluate("client.state") == "closed"


async def test_ids_are_valid_and_unique(browser: BrowserClient) -> None:
    await browser.logged_in()
    ids = await browser.page.evaluate("Array.from({length: 1000}, newMessageId)")
    assert len(set(ids)) == 1000
    assert all(len(name) == 32 and math.isfinite(int(name, 16)) for name in ids)
