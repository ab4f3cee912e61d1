"""Users move between living nodes, or use several at once: they see all replies, whichever node answers."""

from collections.abc import Iterator

import pytest

from tests.support.many_nodes import ManyNodes, standing_nodes
from tests.support.peer import Peer
from tests.support.servers import DemoBackend
from tests.support.talk import question, whole
from tests.support.waiting import wait_until

USER, OTHER = 10001, 10002


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[ManyNodes]:
    """Three nodes. Sweeps are so rare that replies can only arrive by notices in inboxes."""
    folder = tmp_path_factory.mktemp("moving")
    with standing_nodes(folder, demo.url, "a", "b", "c", sweep_interval="1m") as nodes:
        yield nodes


async def grown(someone: Peer, message_id: str) -> None:
    """Wait for much more text of a running answer."""
    await someone.some_text(message_id, len(someone.told[message_id].text) + 120)


async def test_a_client_that_moves_twice_and_back_while_its_answer_is_made_misses_and_repeats_nothing(
    nodes: ManyNodes,
) -> None:
    asked = question(300)
    async with nodes["a"].peer(USER) as someone:
        await someone.chat(USER, asked, "m1")
        await grown(someone, "m1")
    for name in ("b", "c", "a"):
        async with nodes[name].peer(USER, resume=someone.told) as someone:
            if name != "a":
                await grown(someone, "m1")
                assert nodes["a"].pending(), "node a is still answering it"
            else:
                told = await someone.end_of("m1")
    assert told.text == whole(asked)
    assert told.events.count("accepted") == 1
    assert "restart" not in told.events
    assert len([event for event in told.events if event == "delta"]) > 15, "it arrived in pieces"
    assert nodes.opened_by(USER, "m1") == ["a"]
    assert nodes.ai_calls() == 1


async def test_a_client_that_has_moved_sees_its_answer_restart_when_the_node_that_made_it_dies(
    nodes: ManyNodes,
) -> None:
    asked = question(200)
    async with nodes["a"].peer(USER) as someone:
        await someone.chat(USER, asked, "m1")
        await grown(someone, "m1")
    async with nodes["b"].peer(USER, resume=someone.told) as someone:
        await grown(someone, "m1")
        await nodes.killed("a")
        await someone.until(messageId="m1", event="restart")
        await grown(someone, "m1")
        assert nodes["a"].pending(), "its adopter is still answering it"
    async with nodes["c"].peer(USER, resume=someone.told) as someone:
        told = await someone.end_of("m1")
    assert told.text == whole(asked)
    assert told.events.count("restart") == 1
    assert nodes.ai_calls() == 2


async def test_all_sockets_of_a_user_follow_what_is_asked_on_any_and_nobody_elses_do(nodes: ManyNodes) -> None:
    async with (
        nodes["a"].peer(USER) as one,
        nodes["b"].peer(USER) as two,
        nodes["b"].peer(USER) as three,
        nodes["b"].peer(OTHER) as other,
    ):
        for asking, message_id in ((one, "on-a"), (two, "on-b")):
            asked = question(40, message_id)
            await asking.chat(USER, asked, message_id)
            for socket in (one, two, three):
                told = await socket.end_of(message_id)
                assert told.text == whole(asked)
                assert "restart" not in told.events
                assert told.events.count("accepted") == (socket is asking)
                assert told.events.count("delta") > 1, "it arrived in pieces"
        await other.send_frame("HEARTBEAT")
        await other.until(msgType="HEARTBEAT")
        assert [frame["msgType"] for frame in other.frames] == ["INIT", "HEARTBEAT"]
    assert nodes.ai_calls() == 2


async def test_a_second_socket_follows_what_is_asked_as_soon_as_it_is_logged_in(nodes: ManyNodes) -> None:
    async with nodes["a"].peer(USER) as asking:
        for n in range(15):
            message_id = f"at-once-{n}"
            async with nodes["bc"[n % 2]].peer(USER) as watching:
                await asking.send_frame("CHAT", userId=USER, contents=question(2, n), messageId=message_id)
                assert (await watching.end_of(message_id)).text == whole(question(2, n))
                await asking.end_of(message_id)


@pytest.mark.parametrize("behaviour", ["silent", "talking"])
async def test_a_message_is_cancelled_on_another_node_than_the_one_that_answers_it(
    nodes: ManyNodes, behaviour: str
) -> None:
    marker = {"silent": "first=60s", "talking": "first=0 pace=10ms length=3000"}[behaviour]
    abandoned = nodes.any.ai_stats()["abandoned"]
    async with nodes["a"].peer(USER) as asking, nodes["b"].peer(USER) as cancelling, nodes["c"].peer(OTHER) as other:
        await asking.chat(USER, f"never mind [[demo {marker}]]", behaviour)
        await wait_until(lambda: nodes.any.ai_stats()["running"] == 1, "the AI backend is called")
        if behaviour == "talking":
            await asking.some_text(behaviour)
        await other.send_frame("CANCEL", messageId=behaviour)
        assert (await other.until(messageId=behaviour))["code"] == "UNKNOWN"
        await cancelling.send_frame("CANCEL", messageId=behaviour)
        # With a silent backend, node a has nothing to flush, and so no reason to read the record.
        await wait_until(lambda: nodes.any.ai_stats()["abandoned"] == abandoned + 1, "the AI call is closed", limit=3)
        for socket in (asking, cancelling):
            told = await socket.end_of(behaviour)
            assert told.terminal is not None
            assert told.terminal["event"] == "cancelled"
    assert nodes.any.recorded(USER, behaviour)[0] == "cancelled"


async def test_who_has_moved_cancels_where_he_is(nodes: ManyNodes) -> None:
    async with nodes["a"].peer(USER) as someone:
        await someone.chat(USER, "never mind [[demo first=60s]]", "m1")
        await wait_until(lambda: nodes.any.ai_stats()["running"] == 1, "the AI backend is called")
    await wait_until(lambda: nodes["a"].clients() == 0, "the socket is closed")
    async with nodes["b"].peer(USER, resume=someone.told) as someone:
        await someone.send_frame("CANCEL", messageId="m1")
        told = await someone.end_of("m1")
        assert told.terminal is not None
        assert told.terminal["event"] == "cancelled"
        await wait_until(lambda: nodes.any.ai_stats()["running"] == 0, "the AI call is closed", limit=3)


async def test_an_answer_that_takes_longer_than_three_leases_is_asked_for_once(nodes: ManyNodes) -> None:
    asked = question(350, "at length")
    async with nodes["a"].peer(USER) as someone, nodes["b"].peer(USER) as elsewhere:
        await someone.chat(USER, asked, "long")
        for socket in (someone, elsewhere):
            assert (await socket.end_of("long")).text == whole(asked)
    assert nodes.opened_by(USER, "long") == ["a"]
    assert nodes.ai_calls() == 1
