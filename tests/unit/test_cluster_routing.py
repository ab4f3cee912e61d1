"""The key of a command, and the slot of a key."""

from binascii import crc_hqx

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from redis.crc import key_slot

from imstream.redis.cluster import SLOTS, key_of

KEYS = {
    ("XADD", "s", "*", "a", "b"): "s",
    ("set", "k", "EVAL"): "k",
    ("EVALSHA", "digest", 2, "k", "l", "argument"): "k",
    ("EVAL", "return 1", 0): None,
    ("EVAL", "return 1", "0", "argument"): None,
    ("XREADGROUP", "GROUP", "streams", "c", "COUNT", 1, "BLOCK", 1000, "STREAMS", "s", ">"): "s",
    ("XREAD", "streams", "s", "0"): "s",
    ("XINFO", "STREAM", "s"): "s",
    ("XGROUP", "CREATE", "s", "g", "0"): "s",
    ("PING",): None,
    ("info", "memory"): None,
}


@pytest.mark.parametrize("command", KEYS, ids=lambda command: " ".join(map(str, command)))
def test_a_command_goes_where_its_key_is(command: tuple[str | int, ...]) -> None:
    assert key_of(command) == KEYS[command]


@example(b"a{}b{c}")
@example(b"}{tag}")
@given(st.text("{}ab").map(str.encode))
def test_a_key_has_the_slot_that_a_cluster_gives_it(key: bytes) -> None:
    _, opened, rest = key.partition(b"{")
    tag, closed, _ = rest.partition(b"}")
    assert key_slot(key) == crc_hqx(tag if opened and closed and tag else key, 0) % SLOTS
