"""Three nodes behind the real nginx and the real HAProxy, with the configurations of ops/: routing of users."""

import asyncio
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus

from imstream.cli.balancer import Program
from imstream.client import Client, Connected, ConnectionChange
from imstream.demo.answer import canned_answer
from imstream.wire import SUBPROTOCOL
from tests.support.balancing import PROGRAMS, Balancer, start_balancer
from tests.support.peer import peer
from tests.support.processes import free_port, http_status
from tests.support.servers import DemoBackend, NodeProcess, RedisServer, start_node, valkey_binary
from tests.support.users import user_id
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

NODES = ("0", "1", "2")
USERS = range(10001, 13001)
FEW = range(10001, 10151)


@dataclass
class Farm:
    """Three nodes with their Redis and AI backend."""

    folder: Path
    redis: RedisServer
    ai_url: str
    nodes: dict[str, NodeProcess]

    def start(self, node: str) -> None:
        """Start a node, on its previous port if it had one."""
        port = self.nodes[node].port if node in self.nodes else None
        started = start_node(
            self.folder, redis_url=self.redis.url, ai_url=self.ai_url, node=node, port=port, settings={"lease": "2s"}
        )
        self.nodes[node] = started

    def unfinished(self) -> int:
        """Number of unfinished requests of all nodes."""
        with self.redis.client() as client:
            return sum(client.xlen(f"im:{{node:{node}}}:requests") for node in NODES)


@pytest.fixture(scope="module")
def farm(demo: DemoBackend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    folder = tmp_path_factory.mktemp("farm")
    redis = RedisServer(valkey_binary(), free_port(), folder / "redis")
    redis.start()
    farm = Farm(folder, redis, demo.url, {})
    try:
        for node in NODES:
            farm.start(node)
        yield farm
    finally:
        for running in farm.nodes.values():
            running.process.__exit__(None, None, None)
        redis.stop()


@pytest.fixture(scope="module", params=PROGRAMS)
def balancer(request: pytest.FixtureRequest, farm: Farm) -> Iterator[Balancer]:
    ports = [farm.nodes[node].port for node in NODES]
    started = start_balancer(farm.folder, request.param, ports, port=free_port())
    with started.process:
        yield started


async def homes_of(balancer: Balancer, users: Sequence[int]) -> dict[int, str]:
    """The node of each user when all nodes are up; see `Balancer.homes_of`."""
    return await balancer.homes_of(users, NODES if len(users) >= len(FEW) else ())


async def all_home(balancer: Balancer, homes: dict[int, str]) -> None:
    """Wait until all users are routed to their own nodes again: a restarted node is detected within seconds."""

    async def at_home() -> bool:
        return await balancer.nodes_now(homes) == homes

    await wait_until(at_home, "all users are back at their nodes", limit=30)


def spread_over_both(nodes: Iterable[str], lost: str) -> bool:
    """Whether the users of the lost node were spread over both other nodes."""
    shares = Counter(nodes)
    assert lost not in shares
    return min(shares[node] for node in NODES if node != lost) >= 0.25 * shares.total()


# A node gets a third of the ring, within 5 %, and the number of users in it varies.
@pytest.mark.parametrize(
    ("users", "deviation"), [(USERS[:600], 70), pytest.param(USERS, 150, marks=pytest.mark.long)], ids=["600", "3000"]
)
async def test_three_nodes_share_the_users_and_each_user_always_comes_to_the_same_node(
    balancer: Balancer, users: Sequence[int], deviation: int
) -> None:
    homes = await homes_of(balancer, users)
    shares = Counter(homes.values())
    assert sorted(shares) == list(NODES)
    assert all(abs(share - len(users) / 3) <= deviation for share in shares.values()), shares
    assert await homes_of(balancer, FEW) == {user: homes[user] for user in FEW}


async def test_all_balancers_of_a_kind_send_a_user_to_the_same_node(
    balancer: Balancer, farm: Farm, tmp_path: Path
) -> None:
    ports = [farm.nodes[node].port for node in NODES]
    other = start_balancer(tmp_path, balancer.program, ports, port=free_port())
    with other.process:
        assert await homes_of(other, FEW) == await homes_of(balancer, FEW)


async def test_only_a_dead_nodes_users_move_and_they_are_back_when_it_is(balancer: Balancer, farm: Farm) -> None:
    homes = await homes_of(balancer, FEW)
    lost = homes[FEW[0]]
    farm.nodes[lost].process.kill()
    theirs = [user for user in FEW if homes[user] == lost]
    now: dict[int, str] = {}

    async def only_they_have_moved() -> bool:
        nonlocal now
        now = await balancer.nodes_now(FEW)
        return [user for user in FEW if now.get(user) != homes[user]] == theirs and len(now) == len(FEW)

    await wait_until(only_they_have_moved, "the users of the dead node are elsewhere, and nobody else is")
    assert spread_over_both((now[user] for user in theirs), lost)
    farm.start(lost)
    await all_home(balancer, homes)


async def test_a_frozen_nodes_users_are_served_by_the_others(balancer: Balancer, farm: Farm) -> None:
    homes = await homes_of(balancer, FEW)
    frozen = homes[FEW[0]]
    farm.nodes[frozen].process.signal(signal.SIGSTOP)
    try:
        now = await balancer.nodes_of(FEW)
        assert spread_over_both((now[user] for user in FEW if homes[user] == frozen), frozen)
    finally:
        farm.nodes[frozen].process.signal(signal.SIGCONT)
    await all_home(balancer, homes)


async def test_a_draining_node_keeps_its_sockets_and_gets_no_new_ones(balancer: Balancer, farm: Farm) -> None:
    homes = await homes_of(balancer, FEW)
    user, question = FEW[0], "A last one [[demo length=150 pace=10ms]]"
    draining = homes[user]
    async with peer(balancer.ws(user), user=user_id(user)) as socket:
        await socket.chat(user_id(user), question, f"last-{balancer.program}")
        await socket.some_text(f"last-{balancer.program}")
        farm.nodes[draining].process.signal(signal.SIGTERM)
        await wait_until(lambda: http_status(f"{farm.nodes[draining].http}/readyz") == 503, "it drains")
        now = await balancer.nodes_of(user for user in FEW if homes[user] == draining)
        assert spread_over_both(now.values(), draining)
        assert (await socket.end_of(f"last-{balancer.program}")).text == "".join(canned_answer(question))
        assert await socket.closed() == 1012
    assert farm.nodes[draining].process.wait() == 0
    farm.start(draining)
    await all_home(balancer, homes)


async def test_an_answer_goes_on_at_another_node_when_the_users_node_dies(balancer: Balancer, farm: Farm) -> None:
    user, question = FEW[1], "What if you die? [[demo length=150 pace=20ms]]"
    home = (await homes_of(balancer, [user]))[user]
    changes: list[ConnectionChange] = []
    async with Client(balancer.url, user_id(user), on_change=changes.append) as client, asyncio.timeout(60):
        reply = await client.send(question)
        await anext(aiter(reply))
        farm.nodes[home].process.kill()
        assert await reply.text() == "".join(canned_answer(question, 150))
        assert reply.attempt == 2
    connected = [change.node for change in changes if isinstance(change, Connected)]
    assert (connected[0], len(connected)) == (home, 2)
    assert connected[1] != home
    farm.start(home)
    await all_home(balancer, {user: home})


async def test_words_pass_one_by_one_while_the_answer_is_being_made(balancer: Balancer, farm: Farm) -> None:
    question = "Word by word [[demo length=120 pace=30ms]]"
    pieces = canned_answer(question, 120)
    message_id = f"words-{balancer.program}"
    async with peer(balancer.ws(10001), user=user_id(10001)) as socket:
        await socket.chat(user_id(10001), question, message_id)
        deltas: list[str] = []
        while len(deltas) < 30:
            deltas.append((await socket.until(messageId=message_id, event="delta"))["contents"])
        assert farm.unfinished() == 1  # a part of the answer is here, the rest is not generated yet
        assert sum(delta in pieces for delta in deltas) >= 10  # a busy machine may merge many
        assert (await socket.end_of(message_id)).text == "".join(pieces)


async def test_the_page_comes_through_the_balancer(balancer: Balancer) -> None:
    assert http_status(f"{balancer.http}/") == 200
    assert http_status(f"{balancer.http}/imstream.js") == 200


@pytest.mark.parametrize("program", PROGRAMS)
async def test_without_a_node_that_is_ready_a_handshake_is_refused_until_there_is_one(
    program: Program, farm: Farm, tmp_path: Path
) -> None:
    ports = [free_port() for _ in NODES]
    lonely = start_balancer(tmp_path, program, ports, port=free_port(), wait=False)
    with lonely.process:
        assert await lonely.refuses(10001)
        late = start_node(tmp_path, redis_url=farm.redis.url, ai_url=farm.ai_url, node="late", port=ports[1])
        with late.process:

            async def is_taken() -> bool:
                return not await lonely.refuses(10001)

            await wait_until(is_taken, "the node is found")
            assert await lonely.node_of(10001) == "late"


async def test_a_page_behind_the_balancer_is_of_the_same_origin_and_another_one_is_not(balancer: Balancer) -> None:
    url, door = balancer.ws(USERS[0]), f"127.0.0.1:{balancer.port}"
    # Forwarding headers of the client are replaced: it connected from here.
    headers = {"Origin": f"http://{door}", "X-Forwarded-For": "10.0.0.7", "X-Forwarded-Proto": "https"}
    async with peer(url, user=user_id(USERS[0]), headers=headers, subprotocols=[SUBPROTOCOL, "token"]) as socket:
        assert socket.connection.subprotocol == SUBPROTOCOL
    with pytest.raises(InvalidStatus) as refused:
        async with peer(url, headers={"Origin": "https://evil.example.com"}):
            pass
    assert refused.value.response.status_code == 403
