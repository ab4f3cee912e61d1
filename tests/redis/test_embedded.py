"""The embedded server, run by its command as `imstream up` and the Procfile run it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, NoReturn

import pytest
import redis

from imstream import embedded
from imstream.errors import ImstreamError
from tests.support.processes import PYTHON, Running, free_port, start
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def command(port: int, folder: Path) -> list[str]:
    """The command that runs the embedded server."""
    return [PYTHON, "-m", "imstream", "redis", "--port", str(port), "--data", str(folder)]


@contextmanager
def running(port: int, folder: Path, log: Path) -> Iterator[Running]:
    """The embedded server, started and ended by its command."""
    with start(command(port, folder), log) as server:
        yield server


def client(port: int) -> redis.Redis:
    """A client of the test's own."""
    return redis.Redis(port=port, decode_responses=True, socket_timeout=5)


async def test_the_command_becomes_a_server_that_keeps_everything(tmp_path: Path) -> None:
    port = free_port()
    with running(port, tmp_path / "data", tmp_path / "log") as server, client(port) as valkey:
        await wait_until(lambda: embedded.answers(port), "it serves")
        assert valkey.info("server")["process_id"] == server.pid
        settings = valkey.config_get("append*", "save", "maxmemory-policy", "bind", "protected-mode")
        assert settings["appendonly"] == "yes"
        assert settings["appendfsync"] == "everysec"
        assert settings["save"] == ""
        assert settings["maxmemory-policy"] == "noeviction"
        assert settings["bind"] == "127.0.0.1"
        valkey.set("kept", "yes")
        server.kill()
    with running(port, tmp_path / "data", tmp_path / "log") as server, client(port) as valkey:
        await wait_until(lambda: embedded.answers(port), "it serves")
        assert valkey.get("kept") == "yes"
        assert server.terminate() == 0


async def test_a_second_server_on_the_same_data_is_refused(tmp_path: Path) -> None:
    port = free_port()
    with running(port, tmp_path / "data", tmp_path / "log"):
        await wait_until(lambda: embedded.answers(port), "it serves")
        second = subprocess.run(  # noqa: ASYNC221 - nothing else runs meanwhile
            command(free_port(), tmp_path / "data"), capture_output=True, text=True, timeout=30, check=False
        )
    assert second.returncode == 1
    assert "another embedded Valkey runs on" in second.stderr
    assert "IMSTREAM_EMBEDDED_DATA" in second.stderr


async def test_further_configuration_goes_before_what_it_would_have(tmp_path: Path) -> None:
    config = tmp_path / "own.conf"
    config.write_text("maxmemory 32mb\nappendfsync always\nrequirepass secret\n")
    port = free_port()
    with start([*command(port, tmp_path / "data"), "--config", str(config)], tmp_path / "log"):
        await wait_until(lambda: embedded.answers(port), "it serves, if not everybody")
        with redis.Redis.from_url(f"redis://:secret@127.0.0.1:{port}", decode_responses=True) as valkey:
            settings = valkey.config_get("maxmemory", "appendfsync", "appendonly")
    assert settings == {"maxmemory": str(32 << 20), "appendfsync": "always", "appendonly": "yes"}


async def test_a_port_where_nobody_listens_is_no_server() -> None:
    assert not await embedded.answers(free_port())


async def test_a_stranger_on_the_port_is_not_taken_for_the_server() -> None:
    # It accepts and says nothing.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with asyncio.timeout(10):
            assert not await embedded.answers(listener.getsockname()[1])


def test_without_a_server_for_this_machine_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def not_found(name: str) -> NoReturn:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", not_found)
    with pytest.raises(ImstreamError, match="set IMSTREAM_REDIS_URL"):
        embedded.server_command(6390, tmp_path)
    monkeypatch.setattr(metadata, "files", lambda _: None)
    with pytest.raises(ImstreamError, match="set IMSTREAM_REDIS_URL"):
        embedded.server_command(6390, tmp_path)
