"""`imstream balancer` without addresses: runs the program in front of the nodes of the directory in Redis.

Nodes that appear get users after a reload, which disconnects nobody. A node that has died stays in the configuration,
where health checks pass it over, until it leaves the directory (`IMSTREAM_RETIRE_AFTER`).
"""

import asyncio
import signal
import socket
from contextlib import suppress
from dataclasses import replace
from os import getpid
from pathlib import Path
from urllib.parse import urlsplit

import click

from imstream.cli.balancer import BalancerConfig, Program, render, write_configuration
from imstream.cli.supervisor import exit_with_parent
from imstream.errors import StoreError
from imstream.keys import Keys
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.leases import Holder
from imstream.store.nodes import holders
from imstream.urls import host_from_here

POLL_INTERVAL = 1.0
"""Seconds between two looks at the directory, and at least between two reloads."""

_RELOAD: dict[Program, signal.Signals] = {"haproxy": signal.SIGUSR2, "nginx": signal.SIGHUP}


class FollowingBalancer:
    """Keeps the program's configuration the same as the directory of nodes."""

    def __init__(self, settings: Settings, config: BalancerConfig, folder: Path) -> None:
        render(config)  # mistakes are reported before there is a node
        self._keys = Keys(settings.key_prefix)
        self._redis = RedisClient(settings.redis_url, connections=1, timeout=settings.redis_timeout)
        self._config, self._folder, self._pid = config, folder, getpid()
        self._addresses: dict[str, str] = {}
        self._said: dict[str, str] = {}
        self._look, self._stop = asyncio.Event(), asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> int:
        """Run until SIGTERM, SIGINT or the end of the program; return the exit code. SIGHUP looks at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._look.set)
        stopping = asyncio.create_task(self._stop.wait())
        following = asyncio.create_task(self._follow())
        async with self._redis:
            await asyncio.wait([stopping, following], return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if following.done():
                return await following
            following.cancel()
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.terminate()
            await self._process.wait()
        return 0

    async def _follow(self) -> int:
        while self._process is None or self._process.returncode is None:
            self._look.clear()
            try:
                found = await holders(self._redis, self._keys)
            except StoreError as error:
                self._say("redis", f"the nodes in Redis cannot be read, the known ones stay: {error}")
            else:
                self._said.pop("redis", None)
                await self._update({node: await self._address(node, holder) for node, holder in found.items()})
            with suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), POLL_INTERVAL)
        click.echo(f"{self._config.program} has ended with exit code {self._process.returncode}", err=True)
        return 1

    async def _update(self, found: dict[str, str | None]) -> None:
        """Start or reload the program if the addresses have changed. None: the node keeps the one it had."""
        known = {node: address or self._addresses.get(node) for node, address in found.items()}
        addresses = {node: address for node, address in known.items() if address}
        if not addresses or addresses == self._addresses:
            if not self._addresses:
                self._say("nodes", "waiting for a node")
            return
        self._addresses = addresses
        listed = ", ".join(f"{node} at {address}" for node, address in addresses.items())
        config = replace(self._config, nodes=sorted(set(addresses.values())))
        command = write_configuration(config, self._folder)
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(*command, preexec_fn=self._start)
        else:
            self._process.send_signal(_RELOAD[self._config.program])
        self._say("nodes", f"{self._config.program} in front of {listed}")

    async def _address(self, node: str, holder: Holder | None) -> str | None:
        """Where a node is reached from here; None if that is not known."""
        if holder is None:
            return None
        try:
            return await find_address(holder, self._addresses.get(node))
        except ValueError as error:
            self._say(node, f"node {node} cannot be reached from here: {error}")
            return None

    def _start(self) -> None:
        """Prepare the child: it ends with this process, and a reload that comes too early does not end it."""
        signal.signal(_RELOAD[self._config.program], signal.SIG_IGN)
        exit_with_parent(self._pid, signal.SIGTERM)

    def _say(self, about: str, text: str) -> None:
        """Print what is new."""
        if text != self._said.get(about):
            self._said[about] = text
            click.echo(text, err=True)


async def find_address(holder: Holder, known: str | None) -> str:
    """Where a node is reached from here. Raises `ValueError`, which tells why it cannot be.

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


async def follow(settings: Settings, config: BalancerConfig, folder: Path) -> int:
    """See `FollowingBalancer.run`."""
    return await FollowingBalancer(settings, config, folder).run()
