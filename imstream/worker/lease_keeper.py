"""The tenure of a node id: this process holds its lease, renews it in time, and knows when it does not."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import structlog

from imstream.errors import NodeTaken, StoreError
from imstream.settings import Settings
from imstream.store.leases import Held, HeldByOther, Holder, Leases
from imstream.worker.stall import StallWatch

_AGAIN = 0.2
"""Seconds between two tries while the lease cannot be renewed, or is waited for."""

log = structlog.get_logger()


def this_process(address: str) -> Holder:
    """This process as the holder of a lease."""
    return Holder(secrets.token_hex(8), socket.gethostname(), _machine(), os.getpid(), address)


def _machine() -> str:
    """Tells apart what does not share its process ids: machines, their boots, and containers. Empty when unknown."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    return ""


def is_alive(holder: Holder, machine: str) -> bool | None:
    """Whether the process of a holder is alive, when it is one of this machine; None: only its lease can tell."""
    if not machine or holder.machine != machine or holder.pid <= 0:
        return None
    if holder.pid == os.getpid():  # it had our process id before us, as the first process of a container has
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):
        # A dead process whose parent has not asked for its exit code yet: proc(5), the state after the name.
        state = Path(f"/proc/{holder.pid}/stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()[0]
        return state not in "ZX"
    return True


class LeaseKeeper:
    """Holds the lease of this node. `run` until cancelled; `held` tells others whether requests may be taken."""

    def __init__(self, leases: Leases, settings: Settings) -> None:
        self._leases = leases
        # A shorter stall breaks no time limit.
        self.stall = StallWatch(min(settings.redis_timeout, settings.lease).total_seconds())
        self._holder = this_process("")
        self._life = settings.lease.total_seconds()
        # Requests are taken no more before the lease ends: a read that blocks must be back by then.
        self._margin = min(settings.read_block.total_seconds(), self._life / 4)
        self._until = float("-inf")
        # All nodes lose their leases when Redis is away for long enough, and come back to it one by one: each after
        # the try that it was just about to make.
        self._grace = settings.redis_timeout.total_seconds() + 2 * _AGAIN
        self._sure_from = float("-inf")
        self._lost = False
        self._restarted = False
        self._released = False
        # A renewal on its way must not undo the release.
        self._one_at_a_time = asyncio.Lock()

    @property
    def held(self) -> bool:
        """Whether the lease is ours, and will be for a while."""
        return asyncio.get_running_loop().time() < self._until - self._margin

    @property
    def redis_restarted(self) -> bool:
        """Whether Redis was restarted since the process before this one held the lease: see `Held`."""
        return self._restarted

    @property
    def can_declare_dead(self) -> bool:
        """Whether a lease that nobody holds tells that its node is dead: not when Redis was away until a moment ago."""
        return self.held and asyncio.get_running_loop().time() >= self._sure_from

    async def run(self, address: str) -> None:
        """Take the lease, and renew it every third of its life. Redis may come and go meanwhile.

        Args:
            address: Where this node listens.

        Raises:
            NodeTaken: Another process runs this node: at the start, or after this one was away for too long.
        """
        self._holder = this_process(address)
        await self._enter()
        while not self._released:
            renewed = await self._renew()
            await asyncio.sleep(self._life / 3 if renewed else _AGAIN)

    async def mark_stopping(self) -> None:
        """Write into the lease that this process was told to stop. Raises `StoreError`."""
        self._holder = replace(self._holder, stopping=True)
        if not self._released and self._until > float("-inf"):
            await self._try("")

    async def release(self) -> None:
        """Give it up, when nothing is taken any more: others may adopt at once what is left."""
        self._released = True
        async with self._one_at_a_time:
            self._until = float("-inf")
            try:
                await self._leases.release(self._holder)
            except StoreError as error:
                log.warning("lease not released, others will wait for its end", error=str(error))

    async def _enter(self) -> None:
        """Take the lease. One whose holder may be dead is waited for, one that is renewed meanwhile is not."""
        dead, before = "", None
        while (refusal := await self._ask(dead)) is not None:
            holder, left = refusal.holder, refusal.remaining
            alive = is_alive(holder, self._holder.machine)
            if alive or (before is not None and left > before):
                raise NodeTaken(self._leases.node, holder.address, holder.pid, holder.host)
            if alive is False and dead != holder.instance:  # else Redis does not take it for the same one
                log.info("taking over from a process that has died", process=holder.pid)
                dead = holder.instance
                continue
            if before is None:
                log.info("waiting for the lease of this node to end", holder=holder.host, left=left.total_seconds())
            before = left
            await asyncio.sleep(min(_AGAIN, left.total_seconds() + 0.01))

    async def _ask(self, dead: str) -> HeldByOther | None:
        while True:
            try:
                return await self._try(dead)
            except StoreError:  # the worker says that Redis is away
                await asyncio.sleep(_AGAIN)

    async def _renew(self) -> bool:
        ended = asyncio.get_running_loop().time() - self._until
        try:
            refusal = await self._try("")
        except StoreError as error:
            if not self.held and not self._lost:
                self._lost = True
                log.error("lease cannot be renewed, no requests are taken", error=str(error))  # noqa: TRY400 - a trace says no more
            return False
        if refusal is not None:
            holder = refusal.holder
            raise NodeTaken(self._leases.node, holder.address, holder.pid, holder.host)
        if self._lost:
            self._lost = False
            log.info("lease held again")
        elif ended > 0:  # nothing failed: it was this process that came too late
            log.error("lease was lost and is held again: requests may have been taken over", ended_ago=round(ended, 1))
        return True

    async def _try(self, dead: str) -> HeldByOther | None:
        before = asyncio.get_running_loop().time()
        async with self._one_at_a_time:
            if self._released:
                return None
            try:
                answer = await self._leases.acquire(self._holder, dead=dead)
            except StoreError:
                self._sure_from = float("inf")
                raise
            self._until = before + self._life if isinstance(answer, Held) else float("-inf")
            self._restarted = isinstance(answer, Held) and answer.restarted
            if self._sure_from == float("inf"):
                self._sure_from = asyncio.get_running_loop().time() + self._grace
        if isinstance(answer, HeldByOther):
            return answer
        with suppress(StoreError):  # being seen can wait for the next time
            await self._leases.heartbeat()
        return None
