"""The choice among several backends: priority, weight, free slots, breakers, prompts, and the waiting calls."""

import asyncio
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from tenacity import RetryCallState

from imstream.ai.call_gate import CallGate
from imstream.ai.router import Backends, capacity
from imstream.ai.upstream import Upstream
from imstream.errors import BackendError
from imstream.settings import Settings
from imstream.worker.calls import retrying
from imstream.worker.disposition import Wait
from tests.support.processes import free_port
from tests.support.scripted_backend import ScriptedBackend
from tests.support.virtual_time import in_virtual_time

PAUSE = 2.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "backends.toml"


def write(file: Path, **tables: dict[str, Any]) -> None:
    """Write a file of backends, from their names and further keys."""
    lines = list[str]()
    for name, more in tables.items():
        values = {"name": name, "url": f"http://{name}/v1", "model": "m", **more}
        lines += ["[[backend]]", *(f"{key} = {value!r}" for key, value in values.items())]
    file.write_text("\n".join(lines))


def listed(file: Path, *, concurrency: int | None = 8, **tables: dict[str, Any]) -> Backends:
    """The backends of a file, whose breakers open at the first failure."""
    write(file, **tables)
    return Backends(
        Settings.load(ai_backends=file, ai_breaker_failures=1, ai_breaker_pause=PAUSE, concurrency=concurrency)
    )


def named(backends: Backends, name: str) -> Upstream:
    """One of them."""
    return next(one for one in backends if one.name == name)


def taken(backends: Backends, **wish: Any) -> str:  # noqa: ANN401 - see `Backends.take`
    """The name of the backend that a call gets now; the call stays open."""
    upstream = backends.take(**wish)
    assert upstream is not None
    return upstream.name


def fails(upstream: Upstream) -> None:
    """A call has found it away."""
    upstream.record_failure(BackendError("connect_failed", kind="away"), user=10001, period=upstream.gate.period)


@in_virtual_time
async def test_the_lowest_priority_is_called_and_the_next_one_while_its_slots_are_full_or_its_breaker_is_open(
    file: Path,
) -> None:
    backends = listed(file, second={"priority": 1}, first={"concurrency": 2}, third={"priority": 2})
    assert [taken(backends) for _ in range(3)] == ["first", "first", "second"]
    backends.release(named(backends, "first"))
    assert taken(backends) == "first"
    fails(named(backends, "second"))
    assert taken(backends) == "third"


@in_virtual_time
async def test_while_a_long_prompt_waits_others_start_at_a_smaller_backend_and_retries_keep_their_pauses(
    file: Path,
) -> None:
    backends = listed(file, small={"context_tokens": 2048}, large={})
    fails(named(backends, "large"))
    waiting = asyncio.create_task(backends.wait(tokens=1025))
    await asyncio.sleep(0)
    assert backends.waiting == 1
    assert backends.startable() > 0
    away = Wait(timedelta(seconds=3), timedelta(minutes=1), BackendError("http_502", kind="away"))
    loop = retrying(backends)
    state = RetryCallState(retry_object=loop, fn=None, args=(), kwargs={})
    state.set_result(away)
    assert loop.wait(state) >= 3
    fails(named(backends, "small"))
    assert backends.startable() == 0
    assert loop.wait(state) == 0
    waiting.cancel()


@in_virtual_time
async def test_calls_are_shared_in_proportion_to_weights_and_free_slots(file: Path) -> None:
    backends = listed(file, a={"weight": 3, "concurrency": 1000}, b={"concurrency": 1000})
    names = list[str]()
    for _ in range(100):
        upstream = backends.take()
        assert upstream is not None
        names.append(upstream.name)
        backends.release(upstream)
    assert Counter(names) == {"a": 75, "b": 25}
    assert "bb" not in "".join(names)  # spread evenly
    for _ in range(900):  # calls that stay open
        taken(backends)
    carried = {one.name: one.in_flight for one in backends}
    assert carried["a"] < 3 * carried["b"]  # the one with more free slots catches up
    assert carried["a"] > carried["b"]


@in_virtual_time
async def test_a_prompt_that_is_too_long_for_a_backend_goes_to_another_and_delays_no_other(file: Path) -> None:
    backends = listed(file, small={"context_tokens": 2048}, large={"priority": 1, "concurrency": 1})
    assert backends.limits_prompts
    assert taken(backends, tokens=1024) == "small"
    assert taken(backends, tokens=1025) == "large"
    assert backends.take(tokens=1025) is None
    waiting = asyncio.create_task(backends.wait(tokens=1025))
    await asyncio.sleep(0)
    assert taken(backends, tokens=100) == "small"
    backends.release(named(backends, "large"))
    assert (await waiting).name == "large"


@in_virtual_time
async def test_a_backend_that_was_tried_comes_last_and_one_that_continues_comes_first(file: Path) -> None:
    backends = listed(file, a={}, b={"priority": 1}, c={"priority": 2, "continue": "assistant"})
    a, b, c = backends
    assert taken(backends, tried=[a]) == "b"
    assert taken(backends, tried=[a, b, c]) == "a"
    assert taken(backends, continuing=True) == "c"
    assert taken(backends, continuing=True, tried=[c]) == "c"
    fails(c)
    assert taken(backends, continuing=True) == "a"
    other = backends.take_other([a, c])
    assert other is b
    assert backends.take_other([a, b]) is None


@in_virtual_time
async def test_of_two_backends_of_which_one_is_dead_one_call_per_pause_is_made_to_it_while_checks_reach_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = listed(file, dead={}, alive={"priority": 1})
    dead = named(backends, "dead")
    found: BackendError | None = None

    async def check(one: Upstream) -> BackendError | None:
        assert one is dead
        return found

    monkeypatch.setattr(Upstream, "check", check)
    for number in range(200):
        found = BackendError("connection_lost", kind="away") if number >= 100 else None
        await backends.recheck()
        upstream = backends.take()
        assert upstream is not None
        if upstream is dead:
            fails(upstream)
            assert backends.take_other([upstream]) is named(backends, "alive")
        backends.release(upstream)
        await asyncio.sleep(0.1)
    assert (backends.waiting, dead.in_flight) == (0, 0)
    # At 0, and after pauses that double: 2 s, 4 s. Then it is frozen: it accepts connections and does not answer.
    assert dead.calls == 3


@in_virtual_time
async def test_a_check_that_fails_late_closes_no_backend_that_has_come_back_meanwhile(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = listed(file, back={}, other={"priority": 1})
    back = named(backends, "back")

    async def check(_: Upstream) -> BackendError | None:
        await asyncio.sleep(10)
        return BackendError("connection_lost", kind="away")

    monkeypatch.setattr(Upstream, "check", check)
    fails(back)
    await asyncio.sleep(PAUSE)
    checking = asyncio.create_task(backends.recheck())
    await asyncio.sleep(1)
    back.gate.record_success()  # of a call that no other backend could take
    await checking
    assert back.gate.state == "recovering"


@in_virtual_time
async def test_a_prompt_that_is_too_long_for_all_backends_waits_for_none_in_vain(file: Path) -> None:
    backends = listed(file, small={}, large={"context_tokens": 32768, "concurrency": 1})
    small, large = backends
    assert backends.have_larger(small)
    long = small.prompt_limit + 1
    assert taken(backends, tokens=long) == "large"
    waiting = asyncio.create_task(backends.wait(tokens=long))
    await asyncio.sleep(0)
    write(file, small={})
    assert await backends.reload()
    assert await asyncio.wait_for(waiting, 60) is small
    assert taken(backends, tokens=long) == "small"
    assert await asyncio.wait_for(backends.wait(tokens=long), 60) is small
    assert backends.take_other([large], tokens=long) is small


@in_virtual_time
async def test_a_backend_that_no_check_has_reached_is_tried_if_no_other_may_be_called(file: Path) -> None:
    backends = listed(file, away={}, other={"priority": 1, "concurrency": 1})
    fails(named(backends, "away"))
    await asyncio.sleep(PAUSE)
    assert [taken(backends), taken(backends)] == ["other", "away"]


@in_virtual_time
async def test_a_continued_answer_waits_for_a_full_backend_that_continues_and_delays_no_other(file: Path) -> None:
    backends = listed(file, goes_on={"continue": "assistant", "concurrency": 1}, other={"priority": 1})
    goes_on = named(backends, "goes_on")
    assert taken(backends) == "goes_on"
    assert backends.take(continuing=True) is None
    waiting = [asyncio.create_task(backends.wait(continuing=True)) for _ in range(2)]
    await asyncio.sleep(0)
    assert taken(backends) == "other"
    backends.release(goes_on)
    assert taken(backends) == "other"
    assert await waiting[0] is goes_on
    fails(goes_on)
    backends.release(goes_on)
    assert (await waiting[1]).name == "other"


@in_virtual_time
async def test_waiting_calls_get_the_first_backend_that_has_a_free_slot_or_is_back_in_order(file: Path) -> None:
    backends = listed(file, a={"concurrency": 1}, b={"concurrency": 1})
    a, b = backends
    fails(a)
    assert taken(backends) == "b"
    order = list[tuple[int, str]]()

    async def call(number: int) -> None:
        upstream = await backends.wait()
        order.append((number, upstream.name))

    calls = [asyncio.create_task(call(number)) for number in range(3)]
    await asyncio.sleep(0)
    assert backends.take() is None
    backends.release(b)
    await asyncio.sleep(0)
    assert order == [(0, "b")]
    await asyncio.sleep(PAUSE + 0.1)  # the breaker of a is half-open: this call tries it
    assert order == [(0, "b"), (1, "a")]
    a.gate.record_success()
    backends.release(a)
    await asyncio.wait(calls)
    assert order == [(0, "b"), (1, "a"), (2, "a")]


@in_virtual_time
async def test_a_call_that_is_cancelled_while_it_gets_its_turn_leaves_the_slot_to_the_next(file: Path) -> None:
    backends = listed(file, a={"concurrency": 1})
    [a] = backends
    taken(backends)
    first, second = asyncio.create_task(backends.wait()), asyncio.create_task(backends.wait())
    await asyncio.sleep(0)
    backends.release(a)  # the turn of the first
    first.cancel()
    assert (await second) is a
    assert (a.in_flight, a.slots.used, backends.waiting) == (1, 1, 0)


@in_virtual_time
async def test_a_node_reads_as_many_requests_as_its_backends_carry(file: Path) -> None:
    backends = listed(file, concurrency=None, a={"concurrency": 3}, b={}, c={})
    a, b, c = backends
    assert backends.slots() == backends.startable() == 3 + 64
    fails(b)
    assert backends.slots() == 3 + 64  # c carries the rest: they share the default
    fails(c)
    assert backends.slots() == 3
    assert taken(backends) == "a"
    assert backends.slots() == 3
    fails(a)
    assert backends.startable() == 0  # no backend can be called
    assert backends.remaining() == PAUSE
    await asyncio.sleep(PAUSE)
    assert backends.startable() == 1  # one request tries one of them
    probe = backends.take_probe()
    assert probe is a
    assert backends.startable() == 1  # and another one the next


async def test_a_backend_that_cannot_be_reached_is_checked_again_before_that_is_logged(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imstream.ai.router.RECHECK", 1.0)
    late, never = free_port(), free_port()
    tables: dict[str, Any] = {
        "late": {"url": f"http://127.0.0.1:{late}/v1"},
        "never": {"url": f"http://127.0.0.1:{never}/v1"},
    }
    with capture_logs() as logs:
        async with listed(file, **tables) as backends:
            checking = asyncio.create_task(backends.check())
            await asyncio.sleep(0.1)
            async with ScriptedBackend().server.listening("127.0.0.1", late, grace=5):
                await checking
    assert [(one["event"], one["backend"], one["reason"]) for one in logs] == [
        ("backend check failed", "never", "connect_failed")
    ]


@in_virtual_time
async def test_a_backend_that_is_removed_before_its_second_check_is_not_checked_again(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = listed(file, removed={}, kept={})
    checked = list[str]()

    async def check(one: Upstream) -> BackendError | None:
        checked.append(one.name)
        return BackendError("connect_failed", kind="away")

    monkeypatch.setattr(Upstream, "check", check)
    with capture_logs() as logs:
        checking = asyncio.create_task(backends.check())
        await asyncio.sleep(1)
        write(file, kept={})
        assert await backends.reload()
        await checking
    assert checked == ["removed", "kept", "kept"]
    assert [one["backend"] for one in logs] == ["kept"]


async def test_a_file_that_has_changed_keeps_the_backends_that_have_not(file: Path) -> None:
    async with listed(file, kept={}, changed={}, removed={}) as backends:
        kept, changed, removed = backends
        fails(kept)
        assert backends.take(tried=[changed]) is removed
        write(file, changed={"weight": 2}, kept={}, added={})
        assert await backends.reload()
        assert [one.name for one in backends] == ["changed", "kept", "added"]
        assert named(backends, "kept") is kept
        assert kept.gate.state == "away"
        assert named(backends, "changed") is not changed
        assert not await backends.reload()
        await backends.close_retired()
        assert removed.in_flight == 1  # its call stays open
        backends.release(removed)
        await backends.close_retired()
        write(file, changed={"weight": -1})
        with pytest.raises(Exception, match="weight=-1 is not allowed"):
            await backends.reload()
        assert [one.name for one in backends] == ["changed", "kept", "added"]


async def test_calls_that_run_while_their_backend_changes_count_for_its_new_concurrency(file: Path) -> None:
    async with listed(file, a={"concurrency": 2}) as backends:
        [before] = backends
        assert [taken(backends), taken(backends)] == ["a", "a"]
        write(file, a={"concurrency": 3, "weight": 2})
        assert await backends.reload()
        assert taken(backends) == "a"
        assert backends.take() is None
        backends.release(before)
        assert taken(backends) == "a"
        assert backends.take() is None


async def test_a_reload_notices_the_new_value_of_a_variable_that_a_file_names(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_KEY", "old")
    text = '[[backend]]\nname = "a"\nurl = "http://a/v1"\nmodel = "m"\nheaders = {api-key = "env:GATEWAY_KEY"}'
    await asyncio.to_thread(file.write_text, text)
    async with Backends(Settings.load(ai_backends=file)) as backends:
        [before] = backends
        assert not await backends.reload()
        monkeypatch.setenv("GATEWAY_KEY", "new")
        assert await backends.reload()
        assert list(backends) != [before]


async def test_a_call_is_not_forgotten_if_its_backend_can_be_called_a_moment_after_it_could_not(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = listed(file, only={})
    readings = iter([0.001])  # the first reading, before the clock advances
    monkeypatch.setattr(CallGate, "is_closed", property(lambda _: True))
    monkeypatch.setattr(CallGate, "delay", lambda _: next(readings, 0.0))
    async with asyncio.timeout(10):
        assert (await backends.wait()).name == "only"


@in_virtual_time
async def test_a_node_with_a_concurrency_of_its_own_reads_no_more_than_that(file: Path) -> None:
    backends = listed(file, concurrency=8, a={"concurrency": 30}, b={"concurrency": 6})
    assert backends.slots() == 8
    fails(named(backends, "a"))
    assert backends.slots() == 6
    assert {state["nodeSlots"] for state in backends.states().values()} == {8}


def test_the_capacity_of_a_node_is_that_of_its_backends_unless_it_is_set(file: Path) -> None:
    write(file, a={"concurrency": 300}, b={"concurrency": 100})
    assert capacity(Settings.load(ai_backends=file)) == 400
    assert capacity(Settings.load(ai_backends=file, concurrency=50)) == 50
    write(file, a={"concurrency": 300}, b={}, c={})
    assert capacity(Settings.load(ai_backends=file)) == 300 + 64
    assert capacity(Settings.load()) == 64
