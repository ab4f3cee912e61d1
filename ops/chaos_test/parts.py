"""The processes of a run: started on fixed ports, stopped by their pid, restarted on the same port."""

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
"""Time limit for a part to be ready, in seconds."""

_PAGE = os.sysconf("SC_PAGE_SIZE")
_PORTS = range(30_000, 32_700)
"""Above those of the tests, and below those of outgoing connections: nobody takes a port while its part is down."""


def free_ports(count: int) -> list[int]:
    """Unused ports of 127.0.0.1."""
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
    """One process, across restarts.

    Attributes:
        name: Its name in the report and of its log.
        arguments: The imstream command.
        port: The port it listens on.
        folder: Its working folder, which holds its log.
        is_ready: Checks whether it can serve.
        stop_timeout: Maximum number of seconds from SIGTERM to its end.
        starts: Number of starts.
        deaths: Unexpected ends, one sentence each.
    """

    name: str
    arguments: Sequence[str]
    port: int
    folder: Path
    is_ready: Callable[[int], Awaitable[bool]]
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_timeout: float = 10.0
    starts: int = 0
    deaths: list[str] = field(default_factory=list)
    _process: asyncio.subprocess.Process | None = None
    _watch: asyncio.Task[None] | None = None
    _ending: bool = False

    @property
    def log(self) -> Path:
        """Its output, of all starts."""
        return self.folder / f"{self.name.replace(' ', '-')}.log"

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None  # noqa: S101 - it was started
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether there is a process, stopped by SIGSTOP or not."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it, unless it is running."""
        if self.is_running:
            return
        self.starts += 1
        self._ending = False
        clean = {name: value for name, value in os.environ.items() if not name.startswith("IMSTREAM_")}
        with self.log.open("ab") as out:
            self._process = await asyncio.create_subprocess_exec(
                # The kernel kills it if this process is killed.
                *(sys.executable, "-P", "-m", "imstream", "--parent", str(os.getpid()), *self.arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=asyncio.subprocess.STDOUT,
                cwd=self.folder,  # without the `.env` of this checkout
                start_new_session=True,  # Ctrl-C reaches only this process
                env={**clean, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **self.environment},
            )
        self._watch = asyncio.create_task(self._watch_end(self._process))

    async def wait_until_ready(self) -> None:
        """Wait until it is ready; raises TimeoutError after `START_LIMIT`."""
        try:
            async with asyncio.timeout(START_LIMIT):
                while not await self.is_ready(self.port):  # noqa: ASYNC110 - another process' state
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise TimeoutError(f"{self.name} is not ready within {START_LIMIT:g} s: see {self.log}") from None

    async def kill(self) -> None:
        """Send SIGKILL, also to its child processes (nginx has workers)."""
        if self.is_running:
            self._ending = True
            os.killpg(self.pid, signal.SIGKILL)
            await self._wait_gone()

    def freeze(self) -> None:
        """Send SIGSTOP."""
        if self.is_running:
            os.killpg(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Send SIGCONT."""
        if self.is_running:
            os.killpg(self.pid, signal.SIGCONT)

    async def terminate(self) -> None:
        """Send SIGTERM and wait for the end. A late or failed end is added to `deaths`."""
        if not self.is_running or self._process is None:
            return
        self._ending = True
        self._process.terminate()
        try:
            async with asyncio.timeout(self.stop_timeout):
                code = await self._process.wait()
        except TimeoutError:
            self.deaths.append(f"{self.name} did not end within {self.stop_timeout:g} s of SIGTERM")
            await self.kill()
            return
        await self._wait_gone()
        if code not in (0, -signal.SIGTERM):
            self.deaths.append(f"{self.name} ended with exit code {code} on SIGTERM")

    def open_files(self) -> int:
        """Number of its file descriptors."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def memory(self) -> int:
        """Its resident set, in bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE

    def tracebacks(self) -> int:
        """Number of unexpected exceptions in its log."""
        with self.log.open(encoding="utf-8", errors="replace") as lines:
            return sum('"exception":' in line or line.startswith("Traceback") for line in lines)

    async def _wait_gone(self) -> None:
        if self._watch is not None:
            await self._watch

    async def _watch_end(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        if not self._ending:
            self.deaths.append(f"{self.name} exited unexpectedly with exit code {code}")


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
