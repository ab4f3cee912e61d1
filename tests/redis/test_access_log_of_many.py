"""Sentinels and cluster nodes that deny a login or a permission are distinguished from unavailable ones."""

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest

from imstream.errors import StoreDenied
from imstream.redis.client import BlockingReader, RedisClient
from tests.support.redis_sets import cluster_set, sentinel_set
from tests.support.servers import USER
from tests.support.waiting import wait_until

TIMEOUT = timedelta(seconds=10)
LOGIN = "check the user and the password in IMSTREAM_REDIS_URL"
PERMISSION = "grant the user the permissions in ops/redis-users.acl"


async def is_denied(url: str, why: str) -> None:
    """Assert that commands and readers get this error."""
    reader = BlockingReader(url, block=TIMEOUT, timeout=TIMEOUT)
    async with RedisClient(url, connections=1, timeout=TIMEOUT) as redis_client:
        for ask in (redis_client.execute, reader.execute):
            with pytest.raises(StoreDenied, match=why) as denied:
                await ask("XLEN", "im:a")
            assert "secret" not in str(denied.value)
    await reader.aclose()


async def takes_a_password_file(url: str, file: Path) -> None:
    """Assert that the password is read for each connection, so that a changed file needs no restart."""
    with_file = f"{url.replace(USER, 'imstream')}{'&' if '?' in url else '?'}password_file={file}"
    reader = BlockingReader(with_file, block=TIMEOUT, timeout=TIMEOUT)
    async with RedisClient(with_file, connections=1, timeout=TIMEOUT) as redis_client:

        async def reply() -> str:
            try:
                return str([await redis_client.execute("XLEN", "im:a"), await reader.execute("XLEN", "im:a")])
            except StoreDenied as denied:
                return str(denied)

        async def tells(what: str) -> None:
            async def does() -> bool:
                return what in await reply()

            await wait_until(does, what)  # a cluster refreshes its slots after half a second

        await tells(LOGIN)
        for written, what in ((b"\xff", "it is not UTF-8"), (b"wrong\n", LOGIN), (b" imstream-secret\n", "[0, 0]")):
            await asyncio.to_thread(file.write_bytes, written)
            await tells(what)
    await reader.aclose()


async def test_with_sentinel_the_logins_of_the_sentinels_and_of_the_master_are_both_needed(tmp_path: Path) -> None:
    with sentinel_set(tmp_path) as sentinels:
        url = sentinels.url
        await takes_a_password_file(url, tmp_path / "password")
        await is_denied(url.replace(USER, "imstream:wrong-secret"), LOGIN)
        await is_denied(url.replace("sentinel_password=imstream-secret", "sentinel_password=wrong-secret"), LOGIN)
        # Sentinels accept this user, but do not let it request the master.
        other = "sentinel_username=sentinel&sentinel_password=sentinel-secret"
        await is_denied(url.replace("sentinel_username=imstream&sentinel_password=imstream-secret", other), PERMISSION)


async def test_in_a_cluster_a_denied_login_and_a_denied_question_for_the_slots_are_told(tmp_path: Path) -> None:
    with cluster_set(tmp_path) as cluster:
        await takes_a_password_file(cluster.url, tmp_path / "password")
        await is_denied(cluster.url.replace(USER, "imstream:wrong-secret"), LOGIN)
        for server in cluster.all:
            with server.client() as client:
                client.execute_command("ACL", "SETUSER", "imstream", "-cluster|slots")
        await is_denied(cluster.url, PERMISSION)
