"""The report of `imstream streams` about a node's stream."""

import asyncio
import re
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner

from imstream.cli.main import main
from imstream.clock import now_ms
from imstream.errors import StoreRefused
from imstream.keys import GROUP
from imstream.model import Waiting
from imstream.store import inspection
from imstream.store.leases import Holder, Leases
from imstream.store.nodes import BackendState, BackendStates
from tests.redis.conftest import Store, chat_request
from tests.support.processes import free_port


async def look(store: Store, *, newest: int = 5) -> inspection.StreamOverview:
    """Inspect the stream of node 0."""
    return await inspection.inspect_stream(store.redis_client, store.keys, "0", newest=newest)


def command(store: Store, *options: str) -> list[str]:
    """`imstream streams` for this store."""
    return ["streams", "--redis", store.settings.redis_url.get_secret_value(), *options]


async def printed(store: Store, *options: str) -> str:
    """The output of the command for node 0. It runs its own event loop, so it runs in a thread."""
    result = await asyncio.to_thread(CliRunner().invoke, main, command(store, *options))
    assert result.exit_code == 0, result.output
    return result.output


async def fill(store: Store) -> None:
    """Four requests: one dead, one in progress, two waiting."""
    await store.requests.ensure_group()
    for number in range(4):
        await store.requests.admit(chat_request(user_id=10001 + number, message_id=f"m{number}", contents="private"))
    doomed, _ = await store.requests.read(count=2, block=timedelta(seconds=1))
    await store.requests.bury(doomed, reason="http_400", error="no such model", attempts=1)


async def test_a_node_that_never_ran_has_nothing(store: Store) -> None:
    assert await look(store) == inspection.StreamOverview(0, {}, [], None, 0, [])
    result = await asyncio.to_thread(CliRunner().invoke, main, command(store, "--node", "nosuch"))
    assert result.exit_code == 1
    assert "there is no node nosuch in redis://" in result.output
    store.redis.zadd(store.keys.nodes(), {"0": 1})
    out = await printed(store)
    assert "unfinished requests  0: 0 waiting, 0 in work" in out
    assert "dead letters         0\n" in out


async def test_requests_in_work_and_waiting_are_told_apart(store: Store) -> None:
    await fill(store)
    seen = await look(store)
    assert (seen.unfinished, seen.waiting, seen.in_progress) == (3, 2, {"0": 1})
    [work] = seen.oldest
    assert (work.message_id, work.deliveries) == ("m1", 1)
    assert seen.next is not None
    assert (seen.next.user, seen.next.message_id) == ("10003", "m2")
    assert timedelta(0) <= work.since < timedelta(minutes=1)


async def test_the_age_is_that_of_the_request_not_of_its_last_delivery(store: Store) -> None:
    await store.requests.ensure_group()
    asked = int(time.time() * 1000) - 3_600_000
    entry = {"user": "10001", "message_id": "m"}
    entry_id = store.redis.xadd(store.keys.requests("0"), entry, id=f"{asked}-0")  # type: ignore[arg-type] # redis-py's gap
    await store.requests.read(count=1, block=timedelta(seconds=1))
    [work] = (await look(store)).oldest
    assert work.entry_id == entry_id
    assert abs(work.since - timedelta(hours=1)) < timedelta(minutes=1)
    assert "for 36" in await printed(store)


async def test_a_dead_letter_tells_who_what_and_why(store: Store) -> None:
    await fill(store)
    [letter] = (await look(store)).newest_dead
    assert letter.about == {
        "user": "10001", "message_id": "m0", "attempts": "1", "reason": "http_400", "error": "no such model"
    }  # fmt: skip
    assert abs(letter.dead_at - datetime.now(UTC)) < timedelta(minutes=1)


async def test_only_the_newest_dead_letters_are_read(store: Store) -> None:
    for number in range(5):
        store.redis.xadd(store.keys.dead("0"), {"user": str(number)}, id=f"{number + 1}-0")
    seen = await look(store, newest=2)
    assert seen.dead == 5
    assert [letter.about["user"] for letter in seen.newest_dead] == ["4", "3"]
    assert seen.newest_dead[0].about["reason"] == "?"  # an entry written by hand


async def test_the_command_prints_all_of_it_and_never_the_text(store: Store) -> None:
    await fill(store)
    out = await printed(store)
    assert "unfinished requests  3: 2 waiting, 1 in work" in out
    assert "node 0 works on 1" in out
    assert "delivery 1" in out
    assert "dead letters         1, the newest:" in out
    assert "user 10001  message m0  http_400 after 1 attempts: no such model" in out
    assert "private" not in out
    assert "message m0" not in await printed(store, "--newest", "0")


async def test_the_command_shows_the_reason_why_requests_are_not_taken(store: Store) -> None:
    nobody = "the node does not run (it has no lease); no node has adopted its stream"
    store.redis.zadd(store.keys.nodes(), {"0": 1})
    assert nobody not in await printed(store)  # nothing waits
    await fill(store)
    out = await printed(store)
    assert nobody in out
    assert re.search(r"the next one has waited \d+\.\d s  user 10003  message m2", out)
    assert "node 0 works on 1 and does not run" in out
    store.redis.set(store.keys.adopter("0"), "1", px=10_000)
    assert "node 1 has adopted its stream" in await printed(store)
    leases = Leases(store.redis_client, store.settings)
    holder = Holder("instance", "host", "", 1, "http://127.0.0.1:8080")
    await leases.acquire(holder)
    out = await printed(store)
    assert "does not run" not in out
    assert "no reason in Redis" in out
    await leases.acquire(replace(holder, stopping=True))
    assert "the node drains: it takes no requests" in await printed(store)


async def test_the_command_shows_the_backends_that_requests_wait_for(store: Store) -> None:
    await fill(store)
    await Leases(store.redis_client, store.settings).acquire(Holder("i", "host", "", 1, "http://127.0.0.1:8080"))
    states = BackendStates(store.redis_client, store.settings)
    away: BackendState = {
        "state": "away",
        "reason": "http_503",
        "until": now_ms() + 90_500,
        "slots": 9,
        "sharesSlots": True,
    }
    await states.publish({"main": away, "spare": {"state": "working", "slots": 1, "sharesSlots": False}})
    [entry] = store.redis.xpending_range(store.keys.requests("0"), GROUP, "-", "+", 1)
    await store.replies.open(10002, "m1", request=store.requests.request_id(str(entry["message_id"])))
    waiting = Waiting("main", "http_503", "overloaded", 1000)
    await store.replies.wait(10002, "m1", attempt=1, pause=timedelta(seconds=1), why=waiting)
    out = await printed(store)
    assert re.search(r"backend main is away \(http_503\), and is not called for (89|90) s", out)
    assert "all 1 slots are in use" in out  # those of the other backend
    assert re.search(r"user 10002  message m1  for .* s  delivery 1  waits for backend main: http_503", out)
    await states.publish({"main": {"state": "recovering", "slots": 9, "sharesSlots": True}})
    out = await printed(store)
    assert "backend main was away, and calls are paced" in out
    assert "slots are in use" not in out
    await states.publish({"main": {"state": "working", "slots": 9, "sharesSlots": True, "nodeSlots": 1}})
    assert "all 1 slots are in use" in await printed(store)  # those of the node


async def test_many_requests_in_work_are_counted_and_the_oldest_are_listed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "MAX_SHOWN", 1)
    await store.requests.ensure_group()
    for number in range(3):
        await store.requests.admit(chat_request(user_id=10001 + number))
    await store.requests.read(count=3, block=timedelta(seconds=1))
    out = await printed(store)
    assert out.count("delivery 1") == 1
    assert "and 2 more" in out


async def test_a_key_that_was_spoilt_by_hand_is_named(store: Store) -> None:
    for key in (store.keys.requests("0"), store.keys.dead("0")):
        store.redis.set(key, "x")
        with pytest.raises(StoreRefused, match=f"{re.escape(key)}: WRONGTYPE"):
            await look(store)
        store.redis.delete(key)


def test_without_redis_the_command_says_so_and_fails() -> None:
    port = free_port()
    result = CliRunner().invoke(main, ["streams", "--redis", f"redis://me:hush@127.0.0.1:{port}/0"])
    assert result.exit_code == 1
    assert f"no Redis at redis://127.0.0.1:{port}/0: " in result.output
    assert "hush" not in result.output
