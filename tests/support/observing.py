"""A node in its own process, seen from outside: its readiness, log, tasks, connections and memory."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.support.processes import Running, http_status
from tests.support.servers import start_node
from tests.support.waiting import wait_until

_PROGRAM = str(Path(__file__).with_name("observed_node.py"))


@dataclass
class ObservedNode:
    """A running node."""

    port: int
    process: Running

    @property
    def _system(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def ws(self, user_id: int) -> str:
        """Its WebSocket address for a user."""
        return f"ws://127.0.0.1:{self.port}/ws?userId={user_id}"

    async def status(self, path: str = "/readyz") -> int | None:
        """What it answers to a GET now; None when nobody answers."""
        return await asyncio.to_thread(http_status, f"http://127.0.0.1:{self.port}{path}")

    async def becomes(self, status: int, limit: float) -> None:
        """Wait until `/readyz` answers with this status."""

        async def has_become() -> bool:
            return await self.status() == status

        await wait_until(has_become, f"/readyz answers {status}", limit=limit)

    def logged(self, level: str) -> list[str]:
        """The events it has logged at a level."""
        return [line["event"] for line in self._lines() if line.get("level") == level]

    def memory(self) -> int:
        """Bytes that it has in memory."""
        return int(self._system.memory_info().rss)

    def open_files(self) -> int:
        """File descriptors that it has, sockets included."""
        return int(self._system.num_fds())

    def connections_to(self, port: int) -> int:
        """Connections that it has to a port of 127.0.0.1."""
        return sum(bool(one.raddr) and one.raddr.port == port for one in self._system.net_connections("tcp"))

    def clients(self) -> int:
        """How many sockets of clients it has."""
        return sum(bool(one.raddr) and one.laddr.port == self.port for one in self._system.net_connections("tcp"))

    async def tasks(self) -> int:
        """How many asyncio tasks it has now."""
        known = len(self._told_tasks())
        self.process.signal(signal.SIGUSR1)
        await wait_until(lambda: len(self._told_tasks()) > known, "the node tells its tasks")
        return int(self._told_tasks()[-1]["count"])

    def _told_tasks(self) -> list[dict[str, Any]]:
        return [line for line in self._lines() if line["event"] == "tasks"]

    def _lines(self) -> list[dict[str, Any]]:
        """What it has printed; a line that is being written is left for the next time."""
        printed = self.process.output().splitlines()
        return [json.loads(line) for line in printed if line.startswith("{") and line.endswith("}")]


async def start_observed_node(
    folder: Path, *, redis_url: str, ai_url: str, settings: Mapping[str, object], wait: bool = True
) -> ObservedNode:
    """Start a node, and wait until it is ready. The event loop goes on meanwhile: it may run a proxy to Redis."""
    node = await asyncio.to_thread(
        start_node, folder, redis_url=redis_url, ai_url=ai_url, settings=settings, command=(_PROGRAM,), wait=wait
    )
    return ObservedNode(node.port, node.process)
