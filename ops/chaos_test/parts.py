"""The processes of a run: started on fixed ports, ended by the pid that was started, brought back where they were."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

START_LIMIT = 30.0
"""Seconds that a part has until it serves."""

_PAGE = os.sysconf("SC_PAGE_SIZE")
_PORTS = range(20_000, 32_000)
"""Below those that the kernel gives to outgoing connections: one of these could have a part's port on its return."""


def free_ports(count: int) -> list[int]:
    """So many ports of 127.0.0.1 that nobody listens on."""
    ports: list[int] = []
    candidates = iter(random.sample(_PORTS, len(_PORTS)))
    while len(ports) < count:
        port = next(candidates)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        ports.append(port)
    return ports


@dataclass
class Part:
    """One process, as often as it is started.

    Attributes:
        name: What it is called in the table, and its log.
        arguments: The imstream command that it runs.
        port: Where it listens.
        folder: Where its log is kept, and where it runs.
        serves: Tells whether it answers.
        patience: Seconds that it may take to end on SIGTERM.
        starts: How often it was started.
        deaths: When it ended although nobody had ended it: a sentence each.
    """

    name: str
    arguments: Sequence[str]
    port: int
    folder: Path
    serves: Callable[[int], Awaitable[bool]]
    environment: Mapping[str, str] = field(default_factory=dict)
    patience: float = 10.0
    starts: int = 0
    deaths: list[str] = field(default_factory=list)
    _process: asyncio.subprocess.Process | None = None
    _watch: asyncio.Task[None] | None = None
    _ending: bool = False

    @property
    def log(self) -> Path:
        """What it printed, of all its starts."""
        return self.folder / f"{self.name.replace(' ', '-')}.log"

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None  # noqa: S101 - it was started
        return self._process.pid

    @property
    def runs(self) -> bool:
        """Whether there is a process, frozen or not."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it; nothing happens when it runs."""
        if self.runs:
            return
        self.starts += 1
        self._ending = False
        clean = {name: value for name, value in os.environ.items() if not name.startswith("IMSTREAM_")}
        with self.log.open("ab") as out:
            self._process = await asyncio.create_subprocess_exec(
                # The kernel ends it should this process be killed.
                *(sys.executable, "-P", "-m", "imstream", "--parent", str(os.getpid()), *self.arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=asyncio.subprocess.STDOUT,
                cwd=self.folder,  # no `.env` of somebody's own
                start_new_session=True,  # Ctrl-C is ours to handle
                env={**clean, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **self.environment},
            )
        self._watch = asyncio.create_task(self._notice_the_end(self._process))

    async def wait_until_serving(self) -> None:
        """Wait until it answers.

        Raises:
            TimeoutError: It does not within `START_LIMIT`.
        """
        try:
            async with asyncio.timeout(START_LIMIT):
                while not await self.serves(self.port):  # noqa: ASYNC110 - another process' state
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise TimeoutError(f"{self.name} does not serve within {START_LIMIT:g} s: see {self.log}") from None

    async def kill(self) -> None:
        """SIGKILL, to all that it has started too (nginx has workers)."""
        if self.runs:
            self._ending = True
            os.killpg(self.pid, signal.SIGKILL)
            await self._gone()

    def freeze(self) -> None:
        """SIGSTOP."""
        if self.runs:
            os.killpg(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        if self.runs:
            os.killpg(self.pid, signal.SIGCONT)

    async def terminate(self) -> None:
        """SIGTERM, and wait for the end. One that takes too long or fails is a death that is told."""
        if not self.runs or self._process is None:
            return
        self._ending = True
        self._process.terminate()
        try:
            async with asyncio.timeout(self.patience):
                code = await self._process.wait()
        except TimeoutError:
            self.deaths.append(f"{self.name} did not end within {self.patience:g} s of SIGTERM")
            await self.kill()
            return
        await self._gone()
        if code not in (0, -signal.SIGTERM):
            self.deaths.append(f"{self.name} ended with exit code {code} on SIGTERM")

    def open_files(self) -> int:
        """File descriptors that it has."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def memory(self) -> int:
        """Bytes of memory that it holds (resident set)."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE

    def tracebacks(self) -> int:
        """Lines of its log that tell of an exception nobody had foreseen."""
        with self.log.open(encoding="utf-8", errors="replace") as lines:
            return sum('"exception":' in line or line.startswith("Traceback") for line in lines)

    async def _gone(self) -> None:
        if self._watch is not None:
            await self._watch

    async def _notice_the_end(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        if not self._ending:
            self.deaths.append(f"{self.name} ended by itself with exit code {code}")


async def answers_http(port: int, path: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        async with asyncio.timeout(1):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
                return (await reader.readline()).split()[1:2] == [b"200"]
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
