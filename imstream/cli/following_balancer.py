"""`imstream balancer` that follows the directory of nodes in Redis.

Nodes that appear get users after a reload, which closes no connection. A node that has died stays in the configuration,
where health checks pass it over, until it leaves the directory (`IMSTREAM_RETIRE_AFTER`). While Redis is away, the
program runs with the nodes that were known last, also after a restart, or else with those that were given.
"""

import asyncio
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from os import getpid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic_core import from_json, to_json

from imstream.cli.balancer import NODES, BalancerConfig, Program, is_address, render, write_configuration
from imstream.cli.output import echo
from imstream.cli.racing import completes_first
from imstream.cli.supervisor import exit_with_parent
from imstream.errors import StoreError
from imstream.keys import Keys
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.leases import Holder
from imstream.store.nodes import holders
from imstream.urls import host_from_here

POLL_INTERVAL = 1.0  # seconds between two looks at the directory, and at least between two reloads

_RELOAD: dict[Program, signal.Signals] = {"haproxy": signal.SIGUSR2, "nginx": signal.SIGHUP}


class FollowingBalancer:
    """Keeps the program's configuration the same as the directory of nodes."""

    def __init__(self, settings: Settings, config: BalancerConfig, folder: Path) -> None:
        render(config)  # mistakes are reported before there is a node
        self._keys = Keys(settings.key_prefix)
        self._redis = RedisClient(settings.redis_url, connections=1, timeout=settings.redis_timeout)
        self._config, self._folder, self._pid = config, folder, getpid()
        self._file = folder / NODES
        self._addresses = _read_nodes(self._file) or dict(zip(config.nodes, config.nodes, strict=True))
        self._said: dict[str, str] = {}
        self._look, self._stop = asyncio.Event(), asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> int:
        """Run until SIGTERM, SIGINT or the end of the program; return the exit code. SIGHUP looks at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._look.set)
        following = asyncio.create_task(self._follow())
        async with self._redis:
            if await completes_first(following, self._stop.wait()):
                return following.result()
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.terminate()
            await self._process.wait()
        return 0

    async def _follow(self) -> int:
        while self._process is None or self._process.returncode is None:
            self._look.clear()
            known: Mapping[str, str | None]
            try:
                found = await holders(self._redis, self._keys)
            except StoreError as error:
                if "redis" not in self._said:
                    self._say("redis", f"the nodes in Redis cannot be read, the known ones stay: {error}")
                known = self._addresses
            else:
                if self._said.pop("redis", None):
                    echo("the nodes in Redis can be read again", err=True)
                known = {node: await self._address(node, holder) for node, holder in found.items()}
            await self._run_with({node: address for node, address in known.items() if address})
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_INTERVAL):  # `wait_for` may swallow the cancellation of the task
                    await self._look.wait()
        code = self._process.returncode or 0
        echo(f"{self._config.program} has ended with exit code {code}", err=True)
        return 128 - code if code < 0 else code or 1  # as a shell, so that ops/respawn restarts a killed program

    async def _run_with(self, addresses: dict[str, str]) -> None:
        """Start or reload the program, unless it runs with these addresses. Without any, it stays as it is."""
        if not addresses and self._process is None:
            self._say("nodes", "waiting for a node")
        if not addresses or (self._process and addresses == self._addresses):
            return
        self._addresses = addresses
        listed = ", ".join(f"{node} at {address}" for node, address in addresses.items())
        config = replace(self._config, nodes=sorted(set(addresses.values())))
        command = write_configuration(config, self._folder)
        if "redis" not in self._said:  # not those that were given
            self._file.write_bytes(to_json(addresses))
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(*command, preexec_fn=self._start)
        else:
            self._process.send_signal(_RELOAD[self._config.program])
        self._say("nodes", f"{self._config.program} in front of {listed}")

    async def _address(self, node: str, holder: Holder | None) -> str | None:
        """The address of a node as seen from here; if it is unknown, the last known one; None without one."""
        before = self._addresses.get(node)
        if holder is None:
            return before
        try:
            return await find_address(holder, before)
        except ValueError as error:
            self._say(node, f"node {node} cannot be reached from here: {error}")
            return before

    def _start(self) -> None:
        """Prepare the child: it ends with this process, and a reload that comes too early does not end it."""
        signal.signal(_RELOAD[self._config.program], signal.SIG_IGN)
        exit_with_parent(self._pid, signal.SIGTERM)

    def _say(self, about: str, text: str) -> None:
        """Print a text that has changed."""
        if text != self._said.get(about):
            self._said[about] = text
            echo(text, err=True)


def _read_nodes(file: Path) -> dict[str, str]:
    """The addresses of the nodes that were known last; none if they cannot be read."""
    try:
        found: Any = from_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    addresses = found.items() if isinstance(found, dict) else ()
    return {node: address for node, address in addresses if isinstance(address, str) and is_address(address)}


async def find_address(holder: Holder, known: str | None) -> str:
    """Where a node is reached from here. Raises `ValueError` with the reason if it cannot be.

    A name with several addresses may give them in a changing order, and each change would be a reload: `known`, the one
    that is in use, is kept as long as it is one of them.
    """
    try:
        parts = urlsplit(holder.address)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ValueError(f"{holder.address}: {error}") from None
    if not host or not port:
        raise ValueError(f"{holder.address} is not an address with a host and a port")
    if (reached := host_from_here(host, holder.host)) is None:
        raise ValueError(f"it listens on {host} of {holder.host} only")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(reached, port, type=socket.SOCK_STREAM)
    except (ValueError, OSError) as error:
        raise ValueError(f"{reached}: {error}") from None
    ips = [str(address[0]) for *_, address in found]
    addresses = [f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip in ips]
    return known if known in addresses else addresses[0]


async def run(settings: Settings, config: BalancerConfig, folder: Path) -> int:
    """See `FollowingBalancer.run`."""
    return await FollowingBalancer(settings, config, folder).run()
