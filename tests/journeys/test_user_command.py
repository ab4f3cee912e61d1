"""`imstream user` on one server, behind Sentinel and in a cluster."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner

import imstream.cli.admin
from imstream.cli.main import main
from imstream.errors import StoreFull
from imstream.keys import Keys
from tests.support.redis_sets import Topology
from tests.support.users import user_id

USER = user_id(10001)


def command(on: Topology, *words: str) -> list[str]:
    """Run `imstream user …` and return the lines of its output."""
    result = CliRunner().invoke(main, ["user", *words, str(USER), "--redis", on.url], env={"USER": "alice"})
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def test_commands_change_what_show_shows_wherever_redis_is(empty_redis: Topology) -> None:
    assert command(empty_redis, "ban", "--reason", "spam") == [f"user {USER} is banned"]
    assert [line.split()[:2] for line in command(empty_redis, "show")[1:5]] == [
        ["account", "banned"],
        ["reason", "spam"],
        ["by", "alice"],
        ["since", command(empty_redis, "show")[4].split()[1]],
    ]
    assert command(empty_redis, "unban") == [f"user {USER} is unbanned"]
    assert command(empty_redis, "lock", "--for", "1h")[0].startswith(f"user {USER} is locked until 2")
    assert "until" in command(empty_redis, "show")[2]
    assert command(empty_redis, "unlock") == [f"user {USER} is unlocked"]
    assert command(empty_redis, "unlock") == [f"user {USER} was not locked"]
    [account, quota, violations, sockets] = command(empty_redis, "show")[1:]
    assert account == "  account     free"
    assert "0 used on" in quota
    assert quota.endswith("no limit here")
    assert (violations, sockets) == ("  violations  0", "  sockets     none")


@pytest.mark.parametrize("until", ["1.9e12", "1900000000000.5", "0x1ba60d33800"])
def test_a_lock_that_was_written_by_hand_is_shown(until: str, empty_redis: Topology) -> None:
    with empty_redis.client() as client:
        client.hset(Keys().account(USER), mapping={"locked_until": until, "at": "9" * 30})
        assert command(empty_redis, "show")[1:3] == ["  account     locked", "    until     2030-03-17 17:47 (UTC)"]
        client.delete(Keys().account(USER))


def test_a_message_that_was_counted_by_hand_is_shown_whenever_it_claims_to_be(empty_redis: Topology) -> None:
    now = datetime.now(UTC)
    days = [Keys().quota(USER, f"{at:%Y-%m-%d}") for at in (now, now + timedelta(days=1))]  # it may be midnight
    with empty_redis.client() as client:
        for day in days:
            client.zadd(day, {"long-ago": -1e300, "never": "inf", "once": 1.9e12})
        assert command(empty_redis, "quota")[1:] == [
            "  beyond all years  never",
            "  2030-03-17 17:47 (UTC)  once",
            "  beyond all years  long-ago",
        ]
        for day in days:  # a cluster deletes the keys of one slot only
            client.delete(day)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [(Keys().account(USER), "WRONGTYPE"), (Keys().route(USER), "WRONGTYPE"), (Keys().violations(USER), "not a number")],
)
def test_a_key_that_was_spoilt_by_hand_is_named(key: str, wrong: str, empty_redis: Topology) -> None:
    with empty_redis.client() as client:
        client.set(key, "spoilt")
        result = CliRunner().invoke(main, ["user", "show", str(USER), "--redis", empty_redis.url])
        assert result.exit_code == 1
        assert result.output.startswith(f"Error: {key}: ")
        assert wrong in result.output
        client.delete(key)


def test_a_node_that_cannot_be_told_is_named(empty_redis: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: Any) -> None:  # noqa: ANN401 - any arguments
        raise StoreFull("out of memory")

    monkeypatch.setattr(imstream.cli.admin, "send_notice", full)
    with empty_redis.client() as client:
        client.sadd(Keys().route(USER), "7")
        line = command(empty_redis, "ban")[1]
        assert line == "node 7 was not notified and closes the sessions within minutes: out of memory"
        client.delete(Keys().route(USER), Keys().account(USER))
