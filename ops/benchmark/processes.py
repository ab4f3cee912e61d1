"""The processes of the benchmark: started on free ports of 127.0.0.1, measured through /proc, stopped by their pid."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from imstream.cli.embedded_redis import server_command
from imstream.settings import Settings

START_LIMIT = 20.0
"""Time limit for a process to listen, in seconds."""

STOP_LIMIT = 10.0
"""Seconds from SIGTERM to SIGKILL."""

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")

ROOT = Path(__file__).resolve().parents[2]

_NODE_SETTINGS: dict[str, object] = {
    "queue_limit": 10_000,
    "user_limit": 4,
    "concurrency": 10_000,
    "drain_grace": "1s",
    "frame_rate": 0,
    "chats_per_minute": 0,
}
"""Settings of a node: no limit restricts the load, as in the reference services; the others are defaults."""

_NODE_ON_ASYNCIO = """
import asyncio
from imstream import logs
from imstream.node_process import serve
from imstream.settings import Settings
settings = Settings.load()
logs.configure(settings)
asyncio.run(serve(settings))
"""


@dataclass
class Process:
    """A child process that listens on a port."""

    name: str
    popen: subprocess.Popen[bytes]
    port: int
    log: Path

    def cpu(self) -> float:
        """Seconds of CPU of all its threads and of its ended children."""
        return cpu_of(self.popen.pid)

    def memory(self) -> int:
        """Its resident set, in bytes."""
        return int(Path(f"/proc/{self.popen.pid}/statm").read_text().split()[1]) * _PAGE

    def wait_until_listening(self) -> None:
        """Wait until it accepts a connection."""
        deadline = time.monotonic() + START_LIMIT
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                if self.popen.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"{self.name} did not start:\n{self.log.read_text(errors='replace')}")
                time.sleep(0.02)
            else:
                return

    def stop(self) -> None:
        """Stop it, with SIGKILL if necessary."""
        self.popen.send_signal(signal.SIGTERM)
        try:
            self.popen.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()


class Stage:
    """All processes of the benchmark. A context manager: on exit, all of them are stopped.

    Attributes:
        folder: Their working folder.
        redis: The Redis of the nodes.
        backend: The AI backend of all services.
        services: The services that are compared, by name.
    """

    def __init__(self, folder: Path, *, loop: str) -> None:
        self.folder = folder
        self._loop = loop
        self._stack = ExitStack()
        self.redis: Process
        self.backend: Process
        self.services: dict[str, Process] = {}

    def __enter__(self) -> Self:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
        with self._stack:
            self._start_servers()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start_servers(self) -> None:
        port = _free_port()
        self.redis = self._start("redis", port, server_command(port, self.folder / "redis", log_level="warning"))
        port = _free_port()
        self.backend = self._start(
            "backend", port, [sys.executable, "-m", "ops.benchmark.backend", "--port", str(port)]
        )

    def start_services(self, *, profile: Path | None) -> None:
        """Start a node, profiled into the file `profile` if given, and the two reference services."""
        self.start_node("imstream", profile=profile)
        self.services["baseline"] = self._start_reference(
            "baseline", "--ws", "websockets-sansio", "--ws-per-message-deflate", "false"
        )
        self.services["typical"] = self._start_reference("typical")

    def start_node(
        self, name: str, *, profile: Path | None = None, python: str | None = None, **settings: object
    ) -> Process:
        """Start a node with these settings, profiled into the file `profile` if given.

        `python` is an interpreter with another release of imstream, to be run instead of this checkout.

        Each node has its own database unless `redis_url` is given: the same users have sockets on all of them, and
        would be sent the answers of the other nodes.
        """
        port = _free_port()
        given: dict[str, object] = {
            **_NODE_SETTINGS,
            "node": name,
            "port": port,
            "ai_url": self.ai_url,
            "redis_url": self.redis_url(len(self.services)),
            **settings,
        }
        if unknown := given.keys() - Settings.model_fields:
            sys.exit(f"unknown settings: {', '.join(unknown)}")
        command = ["-c", _NODE_ON_ASYNCIO] if self._loop == "asyncio" else ["-m", "imstream", "node"]
        if profile is not None:
            command = ["-m", "cProfile", "-o", str(profile), *command]
        env = {f"IMSTREAM_{name.upper()}": str(value) for name, value in given.items()}
        if python is not None:
            env["PYTHONPATH"] = ""  # not this checkout
        self.services[name] = process = self._start(name, port, [python or sys.executable, *command], env)
        return process

    def _start_reference(self, name: str, *options: str) -> Process:
        port = _free_port()
        command = [sys.executable, "-m", "uvicorn", f"ops.benchmark.{name}:app", "--port", str(port)]
        return self._start(name, port, [*command, "--loop", self._loop, *options], {"BENCH_AI_URL": self.ai_url})

    def redis_url(self, database: int) -> str:
        """The URL of a database in Redis."""
        return f"redis://127.0.0.1:{self.redis.port}/{database}"

    @property
    def ai_url(self) -> str:
        """The URL of the backend."""
        return f"http://127.0.0.1:{self.backend.port}/v1"

    def _start(self, name: str, port: int, command: Sequence[str], env: Mapping[str, str] | None = None) -> Process:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("IMSTREAM_")}
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            popen = subprocess.Popen(  # noqa: S603 - our own programs
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self.folder,  # without the `.env` of this checkout
                process_group=0,  # Ctrl-C reaches only this process
                env={**clean, "PYTHONPATH": str(ROOT), **(env or {})},
            )
        process = Process(name, popen, port, log)
        self._stack.callback(process.stop)
        process.wait_until_listening()
        return process


def cpu_of(pid: int) -> float:
    """Seconds of CPU of a process, of all its threads and of its ended children."""
    # The clock of another process, as clock_getcpuclockid(3) would name it: finer than the ticks of /proc.
    own = time.clock_gettime((~pid << 3) | 2)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return own + sum(map(int, fields[13:15])) / _TICKS  # cutime, cstime; see proc_pid_stat(5)


def machine_cpu() -> float:
    """Seconds of CPU of all processes on this machine, including time stolen by its host."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)  # see proc_stat(5)
    return (user + nice + system + irq + softirq + steal) / _TICKS


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
