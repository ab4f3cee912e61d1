"""Real nginx and HAProxy in front of nodes, started as by `imstream balancer`."""

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from imstream.cli.balancer import Program, find_program
from tests.support.processes import PYTHON, Running, http_status, start, wait_for
from tests.support.servers import missing
from tests.support.users import query, user_id
from tests.support.waiting import wait_until

PROGRAMS: tuple[Program, ...] = ("nginx", "haproxy")

_AT_ONCE = 50
"""Concurrent handshakes: enough to be quick, few enough that none waits long."""


@dataclass
class Balancer:
    """A running balancer."""

    program: Program
    port: int
    process: Running

    @property
    def http(self) -> str:
        """Its HTTP address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Its WebSocket address, without a user."""
        return f"ws://127.0.0.1:{self.port}/ws"

    def ws(self, user: int) -> str:
        """Its WebSocket address for a user."""
        return f"{self.url}?{query(user_id(user))}"

    async def node_of(self, user: int) -> str:
        """The node that accepts a socket of this user now, from its answer to INIT."""
        async with (
            asyncio.timeout(20),
            connect(self.ws(user), compression=None, ping_interval=None, proxy=None) as socket,
        ):
            await socket.send(json.dumps({"msgType": "INIT", "userId": user_id(user)}))
            node: str = json.loads(await socket.recv())["node"]
            return node

    async def nodes_of(self, users: Iterable[int]) -> dict[int, str]:
        """`node_of` for many users."""
        turnstile = asyncio.Semaphore(_AT_ONCE)

        async def one(user: int) -> tuple[int, str]:
            async with turnstile:
                return user, await self.node_of(user)

        return dict(await asyncio.gather(*(one(user) for user in users)))

    async def nodes_now(self, users: Iterable[int]) -> dict[int, str]:
        """`nodes_of` for a wait: empty while a handshake fails, as before the start or while no node is up."""
        try:
            return await self.nodes_of(users)
        except (OSError, InvalidHandshake, ConnectionClosed):
            return {}

    async def homes_of(self, users: Sequence[int], nodes: Iterable[str] = ()) -> dict[int, str]:
        """The node of each user when all nodes are up and none is skipped; `nodes` are those that must have users.

        A node that misses two checks or answers one handshake late, as happens on a busy machine, is passed over for a
        moment. So users are looked up until two rounds in a row agree, the second of them with all nodes.
        """
        homes: dict[int, str] = {}

        async def all_are_at_home() -> bool:
            nonlocal homes
            before, homes = homes, await self.nodes_now(users)
            return bool(homes) and homes == before and {*nodes} <= set(homes.values())

        await wait_until(all_are_at_home, "users come to all nodes, and to the same ones again", limit=60)
        return homes

    async def refuses(self, user: int) -> bool:
        """Whether handshakes are answered with 503."""
        try:
            await self.node_of(user)
        except InvalidStatus as refused:
            return refused.response.status_code == 503
        return False


def start_balancer(folder: Path, program: Program, ports: Sequence[int], *, port: int, wait: bool = True) -> Balancer:
    """Start a balancer in front of the nodes with these ports, and wait until it reaches one."""
    if find_program(program) is None:
        missing(program)
    command = [PYTHON, "-m", "imstream", "balancer", "--program", program, "--listen", f"127.0.0.1:{port}"]
    command += ["--folder", str(folder / program), *(f"127.0.0.1:{node}" for node in ports)]
    running = start(command, folder / f"{program}-{port}.log", cwd=folder)
    balancer = Balancer(program, port, running)
    wait_for(lambda: http_status(f"{balancer.http}/readyz") in ({200} if wait else {502, 503}), running, program)
    return balancer
