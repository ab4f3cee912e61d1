"""redis-py's connection pools, with the options that imstream needs."""

from datetime import timedelta
from pathlib import Path
from typing import Any

from redis.asyncio import BlockingConnectionPool, ConnectionPool, sentinel
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import AuthenticationError
from redis.maint_notifications import MaintNotificationsConfig

from imstream.urls import RedisUrl


def make_pool(url: RedisUrl, *, connections: int, timeout: timedelta) -> ConnectionPool:
    """A pool for the server, or for the master that Sentinel names each time a connection is made.

    It never retries, and gives up a connection attempt after `timeout`.
    """
    if url.topology == "sentinel":
        return _MasterPool(url, connections=connections, timeout=timeout)
    return server_pool(url, url.servers[0], connections=connections, timeout=timeout)


def server_pool(
    url: RedisUrl, server: tuple[str, int], *, connections: int, timeout: timedelta
) -> BlockingConnectionPool:
    """A pool for one server. It never retries, and gives up a connection attempt after `timeout`."""
    options = _connection_options(url, server, timeout)
    return BlockingConnectionPool(max_connections=connections, timeout=timeout.total_seconds(), **options)


def _connection_options(url: RedisUrl, server: tuple[str, int], timeout: timedelta) -> dict[str, Any]:
    """The options of every connection.

    Time limits other than that of connecting are the caller's. redis-py's own would send with `asyncio.wait_for`, which
    costs a task each time and, in Python 3.11, loses a cancellation when sending ends at that moment; and a read that
    it ends would answer None, as if Redis had sent an empty reply.
    """
    options: dict[str, Any] = {**parse_url(url.server_url(*server))}
    if url.password_file is not None:
        options["credential_provider"] = PasswordFile(options.pop("username", None) or "default", url.password_file)
    return {
        **options,
        "socket_timeout": None,
        "socket_connect_timeout": timeout.total_seconds(),
        # A repeated XADD is a second entry, and a repeated XREADGROUP hides the loss of the first.
        "retry": Retry(NoBackoff(), 0),
        "decode_responses": True,
        "encoding_errors": "replace",
        "legacy_responses": False,
        # They would switch off the check for stale connections, and no server here sends any. (None means the default.)
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
        "health_check_interval": 0,
        # Sending the name of the library needs one more permission.
        "driver_info": None,
    }


class PasswordFile(CredentialProvider):
    """A password in a file, read for each connection: it may be written after the node starts, and be changed."""

    def __init__(self, user: str, file: Path) -> None:
        self._user, self._file = user, file

    def get_credentials(self) -> tuple[str, str]:
        """User and password. Without the file the password is empty: the server needs none, or is about to write it."""
        try:
            return self._user, self._file.read_text("utf-8").strip()
        except FileNotFoundError:
            return self._user, ""
        except UnicodeDecodeError:
            raise AuthenticationError("the password_file cannot be read: it is not UTF-8") from None
        except OSError as error:
            raise AuthenticationError(f"the password_file cannot be read: {error.strerror}") from None

    async def get_credentials_async(self) -> tuple[str, str]:
        """As `get_credentials`. The file is small, and connections are rare."""
        return self.get_credentials()


class _MasterPool(sentinel.SentinelConnectionPool):
    """Owns the connections to the Sentinels, too. All of them may be asked within the timeout."""

    def __init__(self, url: RedisUrl, *, connections: int, timeout: timedelta) -> None:
        options = _connection_options(url, url.servers[0], timeout)
        del options["host"], options["port"]
        encrypted = options.pop("connection_class", None) is SSLConnection
        sentinel_timeout = timeout.total_seconds() / (len(url.servers) + 1)
        sentinel_options = {
            **{name: value for name, value in options.items() if name.startswith("ssl_")},
            **{name: options[name] for name in ("retry", "maint_notifications_config", "driver_info")},
            "socket_timeout": sentinel_timeout,
            "socket_connect_timeout": sentinel_timeout,
            "ssl": encrypted,
            **url.sentinel_login,
        }
        self._sentinels = sentinel.Sentinel(url.servers, sentinel_kwargs=sentinel_options)  # type: ignore[no-untyped-call] # redis-py's gap
        super().__init__(  # type: ignore[no-untyped-call] # redis-py's gap
            url.service,
            self._sentinels,
            connection_class=sentinel.SentinelManagedSSLConnection if encrypted else sentinel.SentinelManagedConnection,
            max_connections=connections,
            **options,
        )

    async def aclose(self) -> None:
        await super().aclose()
        await self._sentinels.aclose()
