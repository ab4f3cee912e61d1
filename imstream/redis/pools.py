"""Connections to Redis, as redis-py makes them and we want them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from redis.asyncio import BlockingConnectionPool, ConnectionPool
from redis.asyncio.connection import AbstractConnection, SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import AuthenticationError
from redis.maint_notifications import MaintNotificationsConfig

from imstream.urls import RedisUrl


def make_pool(url: RedisUrl, *, connections: int, timeout: timedelta) -> ConnectionPool:
    """A pool for the server, or for the master that Sentinel names whenever a connection is made.

    It never retries by itself and gives up a connection attempt after `timeout`.
    """
    if url.topology == "sentinel":
        return _MasterPool(url, connections=connections, timeout=timeout)
    return server_pool(url, url.servers[0], connections=connections, timeout=timeout)


def server_pool(
    url: RedisUrl, server: tuple[str, int], *, connections: int, timeout: timedelta
) -> BlockingConnectionPool:
    """Such a pool for one server."""
    options = connection_options(url, server, timeout)
    return BlockingConnectionPool(max_connections=connections, timeout=timeout.total_seconds(), **options)


async def connection_of(pool: ConnectionPool) -> AbstractConnection:
    """A connection that is connected and has nothing left to read. To be released into the pool."""
    connection: AbstractConnection = await pool.get_connection()  # type: ignore[no-untyped-call] # redis-py's gap
    return connection


def connection_options(url: RedisUrl, server: tuple[str, int], timeout: timedelta) -> dict[str, Any]:
    """What redis-py shall know of every connection.

    Every time limit but that of connecting is the caller's. redis-py's own would send with `asyncio.wait_for`, which
    costs a task each time and, in Python 3.11, forgets that it was cancelled when the sending ends at that moment; and
    a read that it ends would answer None, as if Redis had said that nothing came.
    """
    return {
        **_with_password_file(url, parse_url(url.server_url(*server))),
        "socket_timeout": None,
        "socket_connect_timeout": timeout.total_seconds(),
        # A repeated XADD is a second entry, and a repeated XREADGROUP hides the first one's loss.
        "retry": Retry(NoBackoff(), 0),
        "decode_responses": True,
        "encoding_errors": "replace",
        "legacy_responses": False,
        # They switch off the check for stale connections, and no server here sends any. (None would mean the default.)
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
        "health_check_interval": 0,
        # To say which library asks would be one more permission.
        "driver_info": None,
    }


def _with_password_file(url: RedisUrl, options: Mapping[str, Any]) -> dict[str, Any]:
    if url.password_file is None:
        return {**options}
    login = PasswordFile(options.get("username") or "default", url.password_file)
    return {**{name: value for name, value in options.items() if name != "username"}, "credential_provider": login}


class PasswordFile(CredentialProvider):
    """A password in a file, read for each connection: it may be written after a node has started, and be changed."""

    def __init__(self, user: str, file: Path) -> None:
        self._login = user, file

    def get_credentials(self) -> tuple[str, str]:
        """User and password: none without the file, for a server that asks for none, or is about to write it."""
        user, file = self._login
        try:
            return user, file.read_text("utf-8").strip()
        except FileNotFoundError:
            return user, ""
        except UnicodeDecodeError:
            raise AuthenticationError("the password_file cannot be read: it is not UTF-8") from None
        except OSError as error:
            raise AuthenticationError(f"the password_file cannot be read: {error.strerror}") from None

    async def get_credentials_async(self) -> tuple[str, str]:
        """See `get_credentials`. The file is small, and connections are rare."""
        return self.get_credentials()


class _MasterPool(SentinelConnectionPool):
    """Owns the connections to the Sentinels too. They may be asked one after the other within the time limit."""

    def __init__(self, url: RedisUrl, *, connections: int, timeout: timedelta) -> None:
        options = connection_options(url, url.servers[0], timeout)
        del options["host"], options["port"]
        encrypted = options.pop("connection_class", None) is SSLConnection
        each = timeout.total_seconds() / (len(url.servers) + 1)
        tls = {name: value for name, value in options.items() if name.startswith("ssl_")}
        about_sentinels = {
            "socket_timeout": each,
            "socket_connect_timeout": each,
            "retry": options["retry"],
            "maint_notifications_config": options["maint_notifications_config"],
            "driver_info": None,
            "ssl": encrypted,
            **tls,
            **url.sentinel_login,
        }
        self._sentinels = Sentinel(url.servers, sentinel_kwargs=about_sentinels)  # type: ignore[no-untyped-call] # redis-py's gap
        super().__init__(  # type: ignore[no-untyped-call] # redis-py's gap
            url.service,
            self._sentinels,
            connection_class=SentinelManagedSSLConnection if encrypted else SentinelManagedConnection,
            max_connections=connections,
            **options,
        )

    async def aclose(self) -> None:
        await super().aclose()
        await self._sentinels.aclose()
