"""`imstream doctor`: whether a node with these settings can serve, and the changes that it needs."""

import asyncio
import errno
import os
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, Literal

import aiohttp
from pydantic_core import from_json

from imstream.ai.backend import PromptMessage
from imstream.ai.router import Backends
from imstream.ai.upstream import Upstream
from imstream.cli import settings_notes
from imstream.cli.output import show, table
from imstream.cli.up import listen_error, reachable_host
from imstream.errors import BackendError, SettingsError, StoreDenied, StoreError
from imstream.gateway.server import files_needed
from imstream.keys import Keys
from imstream.redis import health
from imstream.redis.client import RedisClient
from imstream.settings import Settings
from imstream.store.inspection import failing_commands
from imstream.store.nodes import NodeOverview, inspect_nodes, redis_now

MAX_CLOCK_DIFFERENCE = timedelta(seconds=2)
"""Largest difference to the clock of Redis without a warning: times of quotas, tokens and logs may be so far off."""

MAX_ROUND_TRIP = timedelta(milliseconds=100)  # longest answer of Redis without a warning: a message waits for several

_ROUND_TRIPS = 10
MIN_REDIS = (6, 2)
_HEALTH_LIMIT = aiohttp.ClientTimeout(total=2)
_MAX_HEALTH = 4096  # bytes of an answer of `/healthz` that are read
_FULL = 0.8  # part of its memory limit from which on Redis is nearly full

State = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check. An `error` keeps the node from serving."""

    check: str
    state: State
    text: str


def run(options: dict[str, str], *, call: bool, as_json: bool) -> int:
    """Print the findings and return the exit code."""
    with redirect_stdout(sys.stderr):  # log lines of the parts that are used
        findings = asyncio.run(_examine(options, call=call))
    rows = [("check", "state", "result"), *((one.check, one.state, one.text) for one in findings)]
    show({"findings": findings}, table(rows), as_json=as_json)
    return int(any(one.state == "error" for one in findings))


async def _examine(options: dict[str, str], *, call: bool) -> list[Finding]:
    try:
        file, warnings = settings_notes.check()
        settings = Settings.load(**options)
    except SettingsError as error:
        return [Finding("settings", "error", str(error))]
    findings = [Finding("settings", "warning", text) for text in warnings]
    findings += [] if warnings else [Finding("settings", "ok", f"read from {file or 'the environment'}")]
    async with RedisClient(settings.redis_url, connections=1, timeout=settings.redis_timeout) as redis:
        nodes = list[NodeOverview]()
        try:
            async for one in _redis(redis, settings):
                findings.append(one)
            nodes = await inspect_nodes(redis, Keys(settings.key_prefix))
        except StoreError as error:
            denied = "denies access" if isinstance(error, StoreDenied) else "does not answer"
            findings.append(Finding("redis", "error", f"{settings.redis_url} {denied}: {error}"))
    findings += await _backends(settings, call=call)
    findings += [one async for one in _ports(settings, nodes)]
    with suppress(SettingsError):  # the file of backends, which is reported
        findings.append(_open_files(settings))
    return findings


async def _redis(redis: RedisClient, settings: Settings) -> AsyncIterator[Finding]:
    """Problems of Redis that endanger messages. Raises `StoreError` when it cannot be reached at all."""
    before = time.time()
    now = await redis_now(redis)
    taken = time.time() - before
    for address, text in (await redis.execute_on_masters("INFO", "server")).items():
        info = _info(text)
        version = info.get("redis_version", "0")
        state: State = "ok" if tuple(map(int, version.split(".")[:2])) >= MIN_REDIS else "error"
        named = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {version}"
        too_old = "" if state == "ok" else " is too old: 6.2 is the first"
        yield Finding("redis", state, f"{named} at {address or settings.redis_url}{too_old}")
    for address, text in (await redis.execute_on_masters("INFO", "memory")).items():
        info = _info(text)
        used, limit = int(info.get("used_memory", "0")), int(info.get("maxmemory", "0"))
        of = f"{limit >> 20} MiB" if limit else "all memory: set maxmemory"
        shown = f"{used >> 20} MiB used of {of}{address and f' on {address}'}"
        yield Finding("redis memory", "ok" if 0 < used < _FULL * limit else "warning", shown)
    warnings = await health.warnings(redis)
    for warning in warnings:
        yield Finding("redis settings", "warning", warning)
    if not warnings:
        yield Finding("redis settings", "ok", "they lose no accepted messages")
    difference = timedelta(seconds=before + taken / 2 - now / 1000)
    state = "ok" if abs(difference) < MAX_CLOCK_DIFFERENCE + timedelta(seconds=taken) else "warning"
    yield Finding("clock", state, f"{abs(difference).total_seconds():.1f} s from the clock of Redis")
    times = [time.monotonic()]
    while len(times) <= _ROUND_TRIPS:
        await redis_now(redis)
        times.append(time.monotonic())
    slowest = max(after - earlier for earlier, after in pairwise(times))
    state = "ok" if slowest < MAX_ROUND_TRIP.total_seconds() else "warning"
    yield Finding("redis speed", state, f"{slowest * 1000:.1f} ms, the slowest of {_ROUND_TRIPS} round trips")
    failing = await failing_commands(redis, Keys(settings.key_prefix), settings.node)
    for error, commands in failing.items():
        yield Finding("redis commands", "error", f"{', '.join(commands)}: {error}")
    if not failing:
        yield Finding("redis commands", "ok", "all that a node uses are allowed and carried out")


def _info(text: str) -> dict[str, str]:
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


async def _backends(settings: Settings, *, call: bool) -> list[Finding]:
    """One for each backend; those that fail are errors if none is left."""
    one_token = settings.model_copy(update={"answer_tokens": 1})
    try:
        async with Backends(one_token if call else settings) as backends:
            results = await asyncio.gather(*(_check(one, call=call) for one in backends))
            addresses = [f"{one.name}: {one.options.model} at {one.options.url}" for one in backends]
    except SettingsError as error:
        return [Finding("backends", "error", str(error))]
    failed: State = "error" if all(results) else "warning"
    return [
        Finding("backend", failed if error else "ok", f"{address}: {error or ('answers' if call else 'is there')}")
        for address, error in zip(addresses, results, strict=True)
    ]


async def _check(one: Upstream, *, call: bool) -> BackendError | None:
    if (error := await one.check()) is not None or not call:
        return error
    try:
        await one.backend.answer([PromptMessage("user", "Hi")], on_text=lambda _: None)
    except BackendError as raised:
        return None if raised.reason == "empty_answer" else raised  # a model that reasons needs more than one token
    return None


async def _ports(settings: Settings, nodes: list[NodeOverview]) -> AsyncIterator[Finding]:
    """Whether the ports are free, or have a process on this machine that runs this node already.

    A node whose lease Redis does not have, because it is away or refuses writes, is asked for its id.
    """
    here = (one for one in nodes if one.host == socket.gethostname() and one.address)
    user = next((one for one in here if (one.address or "").endswith(f":{settings.port}")), None)
    listeners = {"port": (settings.host, settings.port), "metrics": settings.metrics_address(settings.port)}
    for name, address in listeners.items():
        if address is None:
            continue
        where, change = f"{address[0]} port {address[1]}", f"choose another {Settings.variable(name)}"
        error = listen_error(*address)
        if error is None:
            yield Finding(name, "ok", f"{where} is free")
        elif error != os.strerror(errno.EADDRINUSE):
            yield Finding(name, "error", f"{where}: {error}")
        elif (node := user.node if user else await _node_at(*address)) is None:
            yield Finding(name, "error", f"{where} is used by another program: {change}")
        elif not node:
            yield Finding(name, "warning", f"{where} is used by a node that does not show its id there")
        else:
            used = f"{where} is used by node {node}{f' (process {user.pid})' if user else ''}"
            own = node == settings.node
            yield Finding(name, "ok" if own else "error", used if own else f"{used}: {change}")


async def _node_at(host: str, port: int) -> str | None:
    """The id of the node that listens there; empty if it does not show it, None if it is another program."""
    url = f"http://{reachable_host(host)}:{port}/healthz"
    try:
        async with aiohttp.ClientSession() as session, session.get(url, timeout=_HEALTH_LIMIT) as answer:
            found: Any = from_json(await answer.content.read(_MAX_HEALTH))
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return None
    return str(found.get("node", "")) if isinstance(found, dict) and "alive" in found else None


def _open_files(settings: Settings) -> Finding:
    needed, (_, hard) = files_needed(settings), resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard == resource.RLIM_INFINITY or needed <= hard
    shown = "no limit" if hard == resource.RLIM_INFINITY else f"{hard} allowed (ulimit -Hn)"
    more = "" if enough else ": raise the limit, or lower IMSTREAM_NODE_SOCKETS"
    return Finding("open files", "ok" if enough else "warning", f"{shown}, {needed} needed at the most{more}")
