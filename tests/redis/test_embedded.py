"""The embedded server, run by `imstream redis` as in `imstream up` and the Procfile."""

import asyncio
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import pytest
import redis
from click.testing import CliRunner

from imstream.cli import embedded_redis
from imstream.cli.main import main
from imstream.errors import ImstreamError
from tests.support.processes import PYTHON, Running, free_port, start
from tests.support.waiting import wait_until


def command(port: int, folder: Path) -> list[str]:
    """The command that runs the embedded server."""
    return [PYTHON, "-m", "imstream", "redis", "--port", str(port), "--data", str(folder)]


@contextmanager
def running(port: int, folder: Path, log: Path) -> Iterator[Running]:
    """Run the embedded server."""
    with start(command(port, folder), log) as server:
        yield server


@contextmanager
def client(port: int, folder: Path) -> Iterator[redis.Redis]:
    """Connect with the password in the folder."""
    password = (folder / "password").read_text().strip()
    with redis.Redis(port=port, password=password, decode_responses=True, socket_timeout=5) as connected:
        yield connected


async def test_the_command_becomes_a_server_that_keeps_everything(tmp_path: Path) -> None:
    port = free_port()
    data = tmp_path / "data"
    with running(port, data, tmp_path / "log") as server:
        await wait_until(lambda: embedded_redis.answers(port), "it serves")
        with client(port, data) as valkey:
            assert valkey.info("server")["process_id"] == server.pid
            settings = valkey.config_get("append*", "save", "maxmemory-policy", "bind", "stream-node-max-bytes")
            assert settings["stream-node-max-bytes"] == "1024"
            assert settings["appendonly"] == "yes"
            assert settings["appendfsync"] == "everysec"
            assert settings["save"] == ""
            assert settings["maxmemory-policy"] == "noeviction"
            assert settings["bind"] == "127.0.0.1"
            valkey.set("kept", "yes")
        server.kill()
    with running(port, data, tmp_path / "log") as server:
        await wait_until(lambda: embedded_redis.answers(port, data / "password"), "it serves")
        with client(port, data) as valkey:  # with the same password
            assert valkey.get("kept") == "yes"
        assert server.terminate() == 0


async def test_a_pipe_in_the_place_of_the_password_does_not_hold_up_the_start(tmp_path: Path) -> None:
    file, port = tmp_path / "data" / "password", free_port()
    file.parent.mkdir()
    os.mkfifo(file, 0o600)
    with running(port, file.parent, tmp_path / "log"):
        await wait_until(lambda: embedded_redis.answers(port), "it serves")
        assert file.is_file()


async def test_a_password_that_others_could_have_read_is_replaced_and_one_that_they_could_not_stays(
    tmp_path: Path,
) -> None:
    file, port = tmp_path / "data" / "password", free_port()
    file.parent.mkdir()
    for mode, stays in ((0o644, False), (0o600, True)):
        file.write_text('o"n\\e of my own\n')
        file.chmod(mode)
        (file.parent / "temp-17.rdb").touch()
        file.parent.chmod(0o755)
        with running(port, file.parent, tmp_path / "log"):
            await wait_until(lambda: embedded_redis.answers(port, file), "it serves")
            with client(port, file.parent) as valkey:
                assert valkey.ping()
        assert (file.read_text() == 'o"n\\e of my own\n') == stays, oct(mode)
        assert [path for path in (file.parent, *file.parent.iterdir()) if path.stat().st_mode & 0o077] == []
        file.unlink()


async def test_a_server_that_still_loads_its_data_does_not_answer(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("secret\n")
    requests: list[bytes] = []

    async def loads(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"PING\r\n"))
        writer.write(b"+OK\r\n-LOADING Valkey is loading the dataset in memory\r\n")
        writer.close()

    async with await asyncio.start_server(loads, "127.0.0.1") as server:
        assert not await embedded_redis.answers(server.sockets[0].getsockname()[1], file)
    assert requests == [b"*3\r\n$4\r\nAUTH\r\n$7\r\ndefault\r\n$6\r\nsecret\r\nPING\r\n"]


@pytest.fixture
def _no_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Prevent `execv`, and restore the umask."""
    monkeypatch.setattr(os, "execv", pytest.fail)
    previous = os.umask(0o077)
    yield
    os.umask(previous)


@pytest.mark.usefixtures("_no_server")
def test_a_folder_that_cannot_be_made_or_used_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "used" / "lock").mkdir(parents=True)
    for folder in ("file", "file/below", "used", "/proc/nothing", "x" * 300):
        result = CliRunner().invoke(main, command(free_port(), tmp_path / folder)[3:])
        assert result.exit_code == 2
        assert result.output.startswith(f"Error: IMSTREAM_EMBEDDED_DATA={tmp_path / folder} cannot be used: ")
        assert result.output.count("\n") == 1
        assert "Traceback" not in result.output


async def test_a_second_server_on_the_same_data_is_refused(tmp_path: Path) -> None:
    port = free_port()
    with running(port, tmp_path / "data", tmp_path / "log"):
        await wait_until(lambda: embedded_redis.answers(port), "it serves")
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
        await wait_until(lambda: embedded_redis.answers(port), "it serves, if not everybody")
        with redis.Redis.from_url(f"redis://:secret@127.0.0.1:{port}", decode_responses=True) as valkey:
            settings = valkey.config_get("maxmemory", "appendfsync", "appendonly")
    assert settings == {"maxmemory": str(32 << 20), "appendfsync": "always", "appendonly": "yes"}


async def test_a_port_where_nobody_listens_is_no_server() -> None:
    assert not await embedded_redis.answers(free_port())


async def test_a_stranger_on_the_port_is_not_taken_for_the_server() -> None:
    # It accepts connections and sends nothing.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with asyncio.timeout(10):
            assert not await embedded_redis.answers(listener.getsockname()[1])


def test_without_a_server_for_this_machine_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def not_found(name: str) -> NoReturn:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", not_found)
    with pytest.raises(ImstreamError, match="set IMSTREAM_REDIS_URL"):
        embedded_redis.server_command(6390, tmp_path)
    monkeypatch.setattr(metadata, "files", lambda _: None)
    with pytest.raises(ImstreamError, match="set IMSTREAM_REDIS_URL"):
        embedded_redis.server_command(6390, tmp_path)
