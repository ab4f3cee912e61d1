"""Redis over TLS only: one server, Sentinel and Cluster. Of the tested servers, only Debian's Redis supports it."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import pytest

from imstream.errors import SettingsError, StoreUnavailable
from imstream.redis.client import BlockingReader, RedisClient
from imstream.settings import Settings
from imstream.store.requests import Admitted, RequestStream
from tests.redis.conftest import chat_request
from tests.support.certificates import Authority, RedisTls
from tests.support.processes import free_port, wait_for
from tests.support.redis_sets import Topology, cluster_set, sentinel_set
from tests.support.servers import RedisServer, missing, redis_7_binary, start_node
from tests.support.tcp_proxy import TcpProxy, tcp_proxy
from tests.support.waiting import wait_until

TIMEOUT = timedelta(seconds=10)
MANY: dict[str, Callable[..., AbstractContextManager[Topology]]] = {"sentinel": sentinel_set, "cluster": cluster_set}


@pytest.fixture(scope="module")
def binary() -> str:
    found = redis_7_binary()
    if found is None:
        missing("redis-7.0")
        raise AssertionError
    return found


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def tls(authority: Authority) -> RedisTls:
    """A server that requires a certificate of clients."""
    return RedisTls(authority.file, authority.issue("127.0.0.1"), authority.issue("node"))


@pytest.fixture(scope="module")
def server(binary: str, tls: RedisTls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    made = RedisServer(binary, free_port(), tmp_path_factory.mktemp("tls"), tls=tls)
    made.start()
    yield made
    made.stop()


async def refusal(url: str) -> str:
    """The errors of commands and of a reader that cannot connect."""
    reader = BlockingReader(url, block=timedelta(milliseconds=100), timeout=TIMEOUT)
    async with RedisClient(url, connections=1, timeout=TIMEOUT) as redis_client:
        told = set[str]()
        for ask in (redis_client.execute, reader.execute):
            with pytest.raises(StoreUnavailable) as refused:
                await ask("EXISTS", "im:k")
            told.add(str(refused.value))
    await reader.aclose()
    return "\n".join(told)


async def works(url: str) -> None:
    """Assert that a request is admitted and read, by commands and by the reader."""
    settings = Settings.load(redis_url=url)
    reader = BlockingReader(settings.redis_url, block=TIMEOUT, timeout=TIMEOUT)
    async with RedisClient(settings.redis_url, connections=2, timeout=TIMEOUT) as redis_client:
        requests = RequestStream(redis_client, reader, settings)
        await requests.ensure_group()
        assert isinstance(await requests.admit(chat_request(message_id="m")), Admitted)
        [entry] = await requests.read(count=1, block=TIMEOUT)
        assert entry.fields["message_id"] == "m"
        await requests.finish(entry)
    await reader.aclose()


async def test_requests_go_in_and_out_over_tls(server: RedisServer) -> None:
    await works(server.url)


@pytest.mark.parametrize("kind", MANY)
async def test_sentinel_and_cluster_are_found_and_used_over_tls(
    kind: str, binary: str, tls: RedisTls, tmp_path: Path
) -> None:
    with MANY[kind](tmp_path, binary=binary, tls=tls) as started:
        await works(started.url)


@pytest.mark.parametrize("lose", [TcpProxy.drop, TcpProxy.reset], ids=["closed", "reset"])
async def test_a_lost_connection_fails_its_commands_at_once(
    server: RedisServer, lose: Callable[[TcpProxy], None]
) -> None:
    async with tcp_proxy(server.port) as proxy:
        url = server.url.replace(f":{server.port}", f":{proxy.port}")
        async with RedisClient(url, connections=1, timeout=timedelta(minutes=1)) as redis_client:
            await redis_client.execute("XLEN", "im:{node:0}:requests")
            proxy.swallow()
            asking = asyncio.create_task(redis_client.execute("XLEN", "im:{node:0}:requests"))
            await wait_until(lambda: proxy.swallowed > 0, "the command is on its way")
            lose(proxy)
            async with asyncio.timeout(5):
                with pytest.raises(StoreUnavailable):
                    await asking


async def test_a_server_of_another_authority_is_refused_and_why_is_said(
    server: RedisServer, tls: RedisTls, tmp_path: Path
) -> None:
    other = Authority(tmp_path).file
    told = await refusal(server.url.replace(tls.query["ssl_ca_certs"].replace("/", "%2F"), str(other)))
    assert "CERTIFICATE_VERIFY_FAILED" in told
    assert f"127.0.0.1:{server.port}" in told
    assert "CERTIFICATE_VERIFY_FAILED" in await refusal(server.url.replace("ssl_ca_certs", "client_name"))


async def test_a_certificate_for_another_host_is_refused_unless_the_name_is_not_to_be_checked(
    binary: str, authority: Authority, tmp_path: Path
) -> None:
    tls = RedisTls(authority.file, authority.issue("redis.example.com"))
    server = RedisServer(binary, free_port(), tmp_path / "redis", tls=tls)
    server.start()
    try:
        told = await refusal(server.url)
        assert "IP address mismatch, certificate is not valid for '127.0.0.1'" in told
        await works(f"{server.url}&ssl_check_hostname=no")
        await works(f"{server.url}&ssl_cert_reqs=none")
    finally:
        server.stop()


async def test_who_shows_no_certificate_is_refused_by_a_server_that_asks_for_one(
    server: RedisServer, tls: RedisTls
) -> None:
    without = RedisTls(tls.authority, tls.server)
    assert await refusal(RedisServer(server.binary, server.port, server.folder, tls=without).url)


async def test_without_tls_nothing_is_said_to_a_server_that_requires_it(server: RedisServer) -> None:
    assert await refusal(f"redis://imstream:imstream-secret@127.0.0.1:{server.port}/0")
    with server.client() as client:
        assert client.info("commandstats").get("cmdstat_exists") is None


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://h/0?ssl_ca_certs={here}", "only with rediss"),
        ("redis+cluster://h:1?ssl_cert_reqs=none", "only with rediss"),
        ("rediss://h/0?ssl_ca_certs=/nowhere/ca.pem", "ssl_ca_certs: there is no file /nowhere/ca.pem"),
        ("rediss+sentinel://h:1/m?ssl_certfile={here}&ssl_keyfile=/nowhere/k", "ssl_keyfile: there is no file"),
        ("rediss://h/0?ssl_cert_reqs=maybe", "ssl_cert_reqs is one of required, none"),
    ],
)
def test_an_address_that_asks_for_what_cannot_be_is_refused_at_the_start(url: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        Settings.load(redis_url=url.format(here=__file__))


async def test_a_node_serves_over_tls_and_one_that_does_not_trust_the_server_says_so(
    server: RedisServer, tmp_path: Path
) -> None:
    untrusting = server.url.replace("ssl_ca_certs", "client_name")
    ai = f"http://127.0.0.1:{free_port()}/v1"
    node = start_node(tmp_path, redis_url=server.url, ai_url=ai)
    with node.process:
        wait_for(node.is_ready, node.process, "node")
    lost = start_node(tmp_path, redis_url=untrusting, ai_url=ai, node="lost", wait=False)
    with lost.process:
        await wait_until(lambda: "redis not reached" in lost.process.output(), "it says so", limit=15)
        [line] = [line for line in lost.process.output().splitlines() if "redis not reached" in line]
        assert "CERTIFICATE_VERIFY_FAILED" in line
        assert not await asyncio.to_thread(lost.is_ready)
