"""Commands that a node has sent and given up, and that Redis runs after later ones on other connections."""

from typing import Any

import pytest

from imstream.gateway import presence
from imstream.store.replies import Ended, Opened
from imstream.store.scripts import LUA
from tests.redis.conftest import Store, chat_request
from tests.redis.test_dead_letters import FAILED, buried, end, letters_of, office_of, opened, taken
from tests.redis.test_reply_sync import desk
from tests.redis.worker_harness import USER, run_worker
from tests.support.servers import RedisServer
from tests.support.tcp_proxy import Trap, tcp_proxy
from tests.support.waiting import wait_until

ON_SERVERS = ["valkey"]
QUICK_LEASE = "1s"


def calls(client: Any, command: str) -> int:  # noqa: ANN401 - its types are unions of all replies
    """How often Redis has run a command."""
    return int(client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


async def run_late(client: Any, command: Trap, name: str) -> None:  # noqa: ANN401 - see there
    """Let Redis run a command that is held."""
    before = calls(client, name)
    command.released.set()
    await wait_until(lambda: calls(client, name) > before, f"Redis has run the late {name}")


async def test_an_opening_that_runs_after_its_repetition_does_not_supersede_it(redis_server: RedisServer) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, url=proxy.url, redis_timeout="1s", sweep_interval="1h") as worker,
    ):
        await worker.load_scripts()
        opening = proxy.hold(LUA["open"].digest.encode())
        await worker.requests.admit(chat_request(USER, "m"))
        call = await worker.backend.call(1)
        assert opening.sprung
        call.send("one ")
        await wait_until(lambda: worker.recorded_text() == "one ", "text is recorded")
        await run_late(worker.redis, opening, "evalsha")
        call.done("answer")
        await worker.idle()
        assert worker.recorded() == ("done", "one answer")
        assert worker.attempts() == [1]
        assert len(worker.backend.calls) == 1


async def test_an_opening_of_a_drained_node_delays_the_answer_of_the_next_one_only_a_moment(
    redis_server: RedisServer,
) -> None:
    async with tcp_proxy(redis_server.port) as proxy:
        async with run_worker(redis_server, url=proxy.url, lease=QUICK_LEASE) as draining:
            await draining.load_scripts()
            opening = proxy.hold(LUA["open"].digest.encode())
            await draining.requests.admit(chat_request(USER, "m"))
            await wait_until(lambda: opening.sprung, "its opening is on its way")
        async with run_worker(redis_server, node="1", lease=QUICK_LEASE, sweep_interval="1h") as other:
            call = await other.backend.call(1)
            call.send("one ")
            await wait_until(lambda: other.recorded_text() == "one ", "text is recorded")
            await run_late(other.redis, opening, "evalsha")
            call.send("two ")
            (await other.backend.call(2)).done("answer")
            await other.idle()
            assert other.recorded() == ("done", "answer")


async def test_what_an_adopter_reads_after_it_has_released_the_stream_is_answered(redis_server: RedisServer) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, node="1", url=proxy.url, redis_timeout="1s", lease=QUICK_LEASE) as adopter,
    ):
        async with run_worker(redis_server, lease=QUICK_LEASE) as dying:
            await dying.ask("first")
            await dying.backend.call(1)
            await dying.crash()
        first = await adopter.backend.call(1)
        read = proxy.hold(b"XREADGROUP", adopter.keys.requests("0").encode())
        await wait_until(lambda: read.sprung, "a read of the adopted stream is on its way")
        async with run_worker(redis_server, lease=QUICK_LEASE, concurrency=1) as back:
            first.done("x")
            await back.ask("running")
            running = await back.backend.call(1)
            await back.ask("waiting")
            await wait_until(lambda: adopter.adopter.adopted == [], "the stream is released")
            await run_late(back.redis, read, "xreadgroup")
            await wait_until(lambda: len(back.pending()) == 2, "it is delivered to the adopter")
            (await adopter.backend.call(2)).done("y")
            running.done("z")
            await back.idle()
            assert back.recorded("waiting") == ("done", "y")


async def test_a_route_that_is_removed_late_is_written_again(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "_REFRESH_AFTER_ERROR", 4.0)
    async with (
        tcp_proxy(redis_server.port) as proxy,
        desk(redis_server, redis_url=proxy.url, redis_timeout="1s") as node,
    ):
        first = node.session()
        await node.presence.on_login(first, USER)  # type: ignore[arg-type]
        removal = proxy.hold(b"SREM")
        node.gone(first)
        await wait_until(lambda: removal.sprung, "the removal of the route is on its way")
        second = node.session()
        before = calls(node.redis, "pexpire")
        await node.presence.on_login(second, USER)  # type: ignore[arg-type]
        await wait_until(lambda: calls(node.redis, "pexpire") == before + 2, "it is given up, and the route written")
        await run_late(node.redis, removal, "srem")
        assert node.route() == set()
        await wait_until(lambda: node.route() == {"0"}, "it leads here again")


async def test_a_node_that_is_back_stays_in_the_directory(redis_server: RedisServer) -> None:
    settings: dict[str, Any] = {"redis_timeout": "300ms", "lease": "1s", "retire_after": "1ms"}
    async with run_worker(redis_server, lease="200ms") as leaving:
        await leaving.ask()
        (await leaving.backend.call(1)).done("x")
        await leaving.idle()
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, node="1", start=False, url=proxy.url, **settings) as other,
    ):
        other.redis.script_load(LUA["unlist"].text)
        removal = proxy.hold(LUA["unlist"].digest.encode())
        other.start()
        await wait_until(lambda: removal.sprung, "it is being retired")
        async with run_worker(redis_server, lease="1h") as back:
            await back.ask("second")
            await back.backend.call(1)
            await run_late(back.redis, removal, "zscore")
            await back.crash()
            back.redis.delete(back.keys.lease("0"))
        (await other.backend.call(1)).done("x")
        await other.idle()


async def test_an_opening_of_a_retried_request_that_runs_after_the_next_retry_has_failed_reopens_nothing(
    store: Store,
) -> None:
    await buried(store)
    office = office_of(store)
    openings = []
    for _ in range(2):
        [letter] = await letters_of(office)
        assert await office.retry(letter) == "retried"
        entry, request = await taken(store)
        first = await opened(store, entry, request)
        assert isinstance(first, Opened)
        openings.append((entry, request))
        await end(store, "m", first.attempt, FAILED)
        await store.requests.bury(entry, reason="http_503", error="away", attempts=first.attempt)
    assert isinstance(await opened(store, *openings[0]), Ended)
    assert isinstance(await opened(store, *openings[1]), Ended)


async def test_a_node_whose_letter_is_retried_while_it_is_retired_stays_in_the_directory(
    redis_server: RedisServer, store: Store
) -> None:
    await buried(store)
    [letter] = await letters_of(office_of(store))
    await store.redis_client.execute("ZADD", store.keys.nodes(), 1, "0")
    store.redis.script_load(LUA["unlist"].text)
    async with tcp_proxy(redis_server.port) as proxy, run_worker(redis_server, node="1", url=proxy.url) as other:
        removal = proxy.hold(LUA["unlist"].digest.encode())
        await wait_until(lambda: removal.sprung, "the node is being retired")
        assert await office_of(store).retry(letter) == "retried"
        await run_late(store.redis, removal, "zscore")
        (await other.backend.call(1)).done("x")
        await other.idle()
