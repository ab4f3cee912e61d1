"""Redis keys: all are distinct, and those of one script share a slot."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imstream.keys import Keys
from imstream.settings import Settings
from imstream.user_ids import MAX_USER_ID, MIN_USER_ID, USER_ID_PATTERN, UserId

PREFIXES = st.from_regex(r"[A-Za-z0-9._-]{1,32}", fullmatch=True)
NODES = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True)
NUMBERS = st.integers(MIN_USER_ID, MAX_USER_ID)
TEXTS = st.from_regex(USER_ID_PATTERN, fullmatch=True)
USERS = NUMBERS | TEXTS
MESSAGES = st.from_regex(r"[A-Za-z0-9._:-]{1,64}", fullmatch=True)


def hash_tag(key: str) -> str:
    """The hash tag of a key: the text between the first `{` and the next `}`."""
    match = re.search(r"\{([^}]+)\}", key)
    return match[1] if match else key


def all_of_node(keys: Keys, node: str) -> set[str]:
    """The keys of one node."""
    return {
        keys.requests(node),
        keys.load(node),
        keys.dead(node),
        keys.inbox(node),
        keys.lease(node),
        keys.adopter(node),
        keys.status(node),
        keys.probe(node),
    }


def test_keys_are_those_that_operators_know() -> None:
    keys = Keys()
    assert keys.requests("0") == "im:{node:0}:requests"
    assert keys.load("0") == "im:{node:0}:load"
    assert keys.dead("0") == "im:{node:0}:dead"
    assert keys.inbox("0") == "im:{node:0}:inbox"
    assert keys.lease("0") == "im:{node:0}:lease"
    assert keys.nodes() == "im:nodes"
    assert keys.route(10001) == "im:{user:10001}:route"
    assert keys.reply(10001, "m-1") == "im:{user:10001}:reply:m-1"
    assert keys.account(10001) == "im:{user:10001}:account"
    assert keys.violations(10001) == "im:{user:10001}:violations"
    assert keys.quota(10001, "2026-11-24") == "im:{user:10001}:quota:2026-11-24"


@given(PREFIXES, NODES)
def test_all_keys_of_a_node_share_a_slot(prefix: str, node: str) -> None:
    assert {hash_tag(key) for key in all_of_node(Keys(prefix), node)} == {f"node:{node}"}


@given(PREFIXES, USERS, MESSAGES, MESSAGES)
def test_all_keys_of_a_user_share_a_slot(prefix: str, user: UserId, one: str, other: str) -> None:
    keys = Keys(prefix)
    of_user = (
        *(keys.reply(user, one), keys.reply(user, other), keys.route(user)),
        *(keys.account(user), keys.violations(user), keys.quota(user, "2026-11-24")),
    )
    assert {hash_tag(key) for key in of_user} == {f"user:{user}"}


@pytest.mark.parametrize("users", [NUMBERS, TEXTS], ids=["number", "text"])
@given(data=st.data())
def test_no_two_messages_share_a_reply(users: st.SearchStrategy[UserId], data: st.DataObject) -> None:
    one, other = data.draw(st.tuples(PREFIXES, users, MESSAGES)), data.draw(st.tuples(PREFIXES, users, MESSAGES))

    def reply(which: tuple[str, UserId, str]) -> str:
        prefix, user, message = which
        return Keys(prefix).reply(user, message)

    assert (reply(one) == reply(other)) == (one == other)


@given(PREFIXES, NODES, NODES)
def test_no_two_nodes_share_a_key(prefix: str, one: str, other: str) -> None:
    keys = Keys(prefix)
    of_one, of_other = all_of_node(keys, one), all_of_node(keys, other)
    assert len(of_one) == 8
    assert of_one.isdisjoint(of_other) == (one != other)


@given(PREFIXES, NODES)
def test_the_settings_take_the_names_that_keys_are_safe_with(prefix: str, node: str) -> None:
    settings = Settings.load(key_prefix=prefix, node=node)
    assert (settings.key_prefix, settings.node) == (prefix, node)
