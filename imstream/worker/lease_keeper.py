"""Holds and renews the lease of this node; detects stalls of the process, which can cost it the lease."""

import asyncio
import os
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import structlog

from imstream.errors import NodeTaken, StoreError, StoreRefused
from imstream.settings import Settings
from imstream.store.leases import Held, HeldByOther, Holder, Leases

_RETRY_PAUSE = 0.2  # seconds between two tries while the lease cannot be renewed, or is held by another process
STALL_TICK = 0.5  # seconds between two checks for a stall
STALL_AFTERMATH = 1.0  # seconds after a stall during which time-outs are attributed to it

log = structlog.get_logger()


def this_process(address: str) -> Holder:
    """Describe this process as the holder of a lease."""
    machine = ""
    with suppress(OSError):  # process ids are unique within one boot and one container
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        machine = f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    return Holder(secrets.token_hex(8), socket.gethostname(), machine, os.getpid(), address)


def is_alive(holder: Holder, machine: str) -> bool | None:
    """Whether a holder on this machine is alive; None when it is on another one, and only its lease shows it."""
    if not machine or holder.machine != machine or holder.pid <= 0:
        return None
    if holder.pid == os.getpid():  # it had our process id before us, as the first process of a container does
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):
        # A dead process whose parent has not read its exit code yet: proc(5), the state after the name.
        state = Path(f"/proc/{holder.pid}/stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()[0]
        return state not in "ZX"
    return True


class LeaseKeeper:
    """Holds the lease of this node. `run` until cancelled; `held`: whether requests may be read."""

    def __init__(self, leases: Leases, settings: Settings) -> None:
        self._leases = leases
        self._holder = this_process("")
        self._ttl = settings.lease.total_seconds()
        # `held` ends this long before the lease, so that a blocked read is back by then.
        self._margin = min(settings.read_block.total_seconds(), self._ttl / 4)
        self._expires_at = float("-inf")
        # When Redis was away, all leases may have ended, and each node comes back with its next try.
        self._grace = settings.redis_timeout.total_seconds() + 2 * _RETRY_PAUSE
        self._certain_from = float("-inf")
        self._loss_logged = False
        self._released = False
        self.reaches_redis = False  # whether Redis answered the last renewal, if only that the key is no lease
        self.redis_restarted = False
        """Whether Redis was restarted since an earlier process of this node held the lease: see `Held`."""
        self._lock = asyncio.Lock()  # a renewal under way must not undo the release

    @property
    def instance(self) -> str:
        """This process, as named in the lease."""
        return self._holder.instance

    @property
    def held(self) -> bool:
        """Whether this process holds the lease, and will for long enough to read requests."""
        return asyncio.get_running_loop().time() < self._expires_at - self._margin

    @property
    def can_declare_dead(self) -> bool:
        """Whether a node without a lease is dead. Not for a moment after Redis was away: see `_grace`."""
        return self.held and asyncio.get_running_loop().time() >= self._certain_from

    async def run(self, address: str) -> None:
        """Take the lease, with `address` in it, and renew it. Raises `NodeTaken`: another process runs this node."""
        self._holder = this_process(address)
        await self._acquire()
        while not self._released:
            renewed = await self._renew()
            await asyncio.sleep(self._ttl / 3 if renewed else _RETRY_PAUSE)

    async def mark_stopping(self) -> None:
        """Record in the lease that this process is stopping. Raises `StoreError`."""
        self._holder = replace(self._holder, stopping=True)
        if not self._released and self._expires_at > float("-inf"):
            await self._hold()

    async def publish(self) -> None:
        """Renew the lease now, because the status of the node has changed. Redis may be away."""
        if self.held:
            with suppress(StoreError):
                await self._hold()

    async def release(self) -> None:
        """Release the lease after the last read of requests: others may adopt the rest at once."""
        self._released = True
        async with self._lock:
            self._expires_at = float("-inf")
            try:
                await self._leases.release(self._holder)
            except StoreError as error:
                log.warning("lease not released, others will wait for its end", error=str(error))

    async def _acquire(self) -> None:
        """Take the lease. Wait for one whose holder may be dead; fail if it is renewed twice meanwhile."""
        dead, before, renewals = "", None, 0
        while True:
            try:
                refusal = await self._hold(dead)
            except StoreError:  # the consumer logs that Redis is away
                await asyncio.sleep(_RETRY_PAUSE)
                continue
            if refusal is None:
                return
            holder, left = refusal.holder, refusal.remaining
            alive = is_alive(holder, self._holder.machine)
            renewals += before is not None and left > before
            if alive or renewals > 1:  # one may be of a process that has died, which Redis has run late
                raise NodeTaken(self._leases.node, holder.address, holder.pid, holder.host)
            if alive is False and dead != holder.instance:  # else Redis has another instance in the lease
                log.info("taking over from a process that has died", process=holder.pid)
                dead = holder.instance
                continue
            if before is None:
                log.info("waiting for the lease of this node to end", holder=holder.host, left=left.total_seconds())
            before = left
            await asyncio.sleep(min(_RETRY_PAUSE, left.total_seconds() + 0.01))

    async def _renew(self) -> bool:
        ended = asyncio.get_running_loop().time() - self._expires_at
        try:
            refusal = await self._hold()
        except StoreError as error:
            if not self.held and not self._loss_logged:
                self._loss_logged = True
                log.error("lease cannot be renewed, no requests are taken", error=str(error))  # noqa: TRY400 - no defect
            return False
        if refusal is not None:
            holder = refusal.holder
            raise NodeTaken(self._leases.node, holder.address, holder.pid, holder.host)
        if self._loss_logged:
            self._loss_logged = False
            log.info("lease held again")
        elif ended > 0:  # no try failed: this process was late
            log.error("lease was lost and is held again: requests may have been taken over", ended_ago=round(ended, 1))
        return True

    async def _hold(self, dead: str = "") -> HeldByOther | None:
        before = asyncio.get_running_loop().time()
        async with self._lock:
            if self._released:
                return None
            try:
                answer = await self._leases.acquire(self._holder, dead=dead)
            except StoreError as error:
                self.reaches_redis = isinstance(error, StoreRefused)  # such as a key of another type
                self._certain_from = float("inf")
                raise
            self.reaches_redis = True
            self._expires_at = before + self._ttl if isinstance(answer, Held) else float("-inf")
            self.redis_restarted = isinstance(answer, Held) and answer.restarted
            if isinstance(answer, Held) and answer.older_by is not None:
                log.error("redis has come back with older data", older_by_seconds=answer.older_by.total_seconds())
            if self._certain_from == float("inf"):
                self._certain_from = asyncio.get_running_loop().time() + self._grace
        if isinstance(answer, HeldByOther):
            return answer
        with suppress(StoreError):  # the directory entry can wait for the next renewal
            await self._leases.heartbeat()
        return None


class StallDetector:
    """Measures how late a timer is; `limit` seconds are a stall, and make Redis seem lost. `run` until cancelled."""

    def __init__(self, limit: float, on_tick: Callable[[float], None] = lambda _: None) -> None:
        """`on_tick`: is called with each lateness, in seconds."""
        self._loop = asyncio.get_running_loop()
        self._limit = limit
        self._on_tick = on_tick
        self._due = float("inf")
        self._ended_at = float("-inf")

    def stalled_recently(self) -> bool:
        """Whether a stall is going on, or has just ended."""
        now = self._loop.time()
        return now - self._due > self._limit or now - self._ended_at < STALL_AFTERMATH

    async def run(self) -> None:
        """Check every `STALL_TICK`."""
        while True:
            self._due = self._loop.time() + STALL_TICK
            await asyncio.sleep(STALL_TICK)
            late = self._loop.time() - self._due
            self._on_tick(max(0.0, late))
            if late > self._limit:
                self._ended_at = self._loop.time()
                log.warning("event loop stood still: the process was frozen or had no CPU", seconds=round(late, 1))
