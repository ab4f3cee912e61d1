"""https and wss through the real nginx and the real HAProxy, as `imstream balancer --cert` starts them."""

import asyncio
import http.client
import json
import socket
import ssl
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from imstream.cli.balancer import Program, find_program
from imstream.client import Client, NotConnected, Timing
from imstream.demo.answer import canned_answer
from tests.journeys.page_support import open_page, running_chromium
from tests.support.balancing import PROGRAMS
from tests.support.certificates import Authority, Certificate
from tests.support.processes import PYTHON, Running, free_port, http_status, start, wait_for
from tests.support.servers import DemoBackend, NodeProcess, RedisServer, missing, start_node, valkey_binary
from tests.support.users import query, user_id
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

USERS = range(10001, 10041)


@dataclass
class TlsBalancer:
    """A balancer with TLS, and the port that redirects plain HTTP."""

    program: Program
    port: int
    redirect: int
    authority: Authority
    process: Running

    @property
    def wss(self) -> str:
        """Its WebSocket address."""
        return f"wss://localhost:{self.port}/ws"

    async def node_of(self, user: int) -> str:
        """The node that accepts a socket of this user."""
        async with connect(f"{self.wss}?{query(user_id(user))}", ssl=self.authority.client(), proxy=None) as opened:
            await opened.send(json.dumps({"msgType": "INIT", "userId": user_id(user)}))
            node: str = json.loads(await opened.recv())["node"]
            return node

    def get(self, path: str, *, port: int | None = None) -> http.client.HTTPResponse:
        """The response to a GET, with TLS or without on another port."""
        if port is None:
            asked: http.client.HTTPConnection = http.client.HTTPSConnection(
                "localhost", self.port, context=self.authority.client(), timeout=5
            )
        else:
            asked = http.client.HTTPConnection("localhost", port, timeout=5)
        try:
            asked.request("GET", path)
            answer = asked.getresponse()
            answer.read()
            return answer
        finally:
            asked.close()


def start_balancer(
    folder: Path, program: Program, authority: Authority, certificate: Certificate, ports: Sequence[int]
) -> TlsBalancer:
    """Start a balancer with certificate and key in two files, and wait until it reaches a node."""
    if find_program(program) is None:
        missing(program)
    port, redirect = free_port(), free_port()
    command = [PYTHON, "-m", "imstream", "balancer", "--program", program, "--listen", f"127.0.0.1:{port}"]
    command += ["--cert", str(certificate.chain), "--key", str(certificate.key), "--redirect", f"127.0.0.1:{redirect}"]
    command += ["--folder", str(folder / program), *(f"127.0.0.1:{node}" for node in ports)]
    running = start(command, folder / f"{program}.log", cwd=folder)
    balancer = TlsBalancer(program, port, redirect, authority, running)
    wait_for(lambda: _serves(balancer), running, program)
    return balancer


def _serves(balancer: TlsBalancer) -> bool:
    try:
        return balancer.get("/readyz").status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def certificate(authority: Authority) -> Certificate:
    return authority.issue("localhost")


@pytest.fixture(scope="module")
def nodes(demo: DemoBackend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[NodeProcess]]:
    folder = tmp_path_factory.mktemp("nodes")
    redis = RedisServer(valkey_binary(), free_port(), folder / "redis")
    redis.start()
    started = [start_node(folder, redis_url=redis.url, ai_url=demo.url, node=node) for node in "01"]
    yield started
    for node in started:
        node.process.__exit__(None, None, None)
    redis.stop()


@pytest.fixture(scope="module", params=PROGRAMS)
def balancer(
    request: pytest.FixtureRequest,
    authority: Authority,
    certificate: Certificate,
    nodes: list[NodeProcess],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[TlsBalancer]:
    folder = tmp_path_factory.mktemp("balancer")
    started = start_balancer(folder, request.param, authority, certificate, [node.port for node in nodes])
    with started.process:
        yield started


async def test_a_chat_over_wss_is_answered(balancer: TlsBalancer) -> None:
    async with Client(balancer.wss, user_id(10001), tls=balancer.authority.client()) as client, asyncio.timeout(30):
        assert await (await client.send("why?")).text() == "".join(canned_answer("why?"))


async def test_each_user_comes_to_the_same_node_over_wss_too(balancer: TlsBalancer) -> None:
    async def two_rounds_agree() -> bool:  # on a busy machine, a node may be passed over for a moment
        first = await asyncio.gather(*map(balancer.node_of, USERS))
        return set(first) == {"0", "1"} and await asyncio.gather(*map(balancer.node_of, USERS)) == first

    await wait_until(two_rounds_agree, "all users come to the same nodes again")


async def test_a_client_that_does_not_trust_the_authority_does_not_connect(balancer: TlsBalancer) -> None:
    timing = Timing(open=timedelta(seconds=6))
    with pytest.raises(NotConnected, match="CERTIFICATE_VERIFY_FAILED"):
        async with Client(balancer.wss, user_id(10001), timing=timing):
            pass


async def test_a_certificate_for_another_name_is_not_taken(balancer: TlsBalancer) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"127\.0\.0\.1"):
        async with connect(balancer.wss.replace("localhost", "127.0.0.1"), ssl=balancer.authority.client(), proxy=None):
            pass


async def test_the_chat_command_trusts_what_openssl_is_told_to(balancer: TlsBalancer, tmp_path: Path) -> None:
    words = ("chat", "--url", balancer.wss, "--user", str(user_id(10002)), "--lang", "en", "why?")
    command = [PYTHON, "-m", "imstream", *words]
    with start(command, tmp_path / "log", env={"SSL_CERT_FILE": str(balancer.authority.file)}) as chat:
        assert await asyncio.to_thread(chat.wait) == 0, chat.output()
    assert "".join(canned_answer("why?")) in chat.output()


def test_only_tls_1_2_and_1_3_are_spoken(balancer: TlsBalancer) -> None:
    for version, spoken in (("TLSv1_3", True), ("TLSv1_2", True), ("TLSv1_1", False)):
        context = balancer.authority.client()
        context.set_ciphers("DEFAULT:@SECLEVEL=0")  # otherwise the client would refuse
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about TLS 1.1
            context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
        with socket.create_connection(("localhost", balancer.port), 5) as plain:
            try:
                with context.wrap_socket(plain, server_hostname="localhost"):
                    assert spoken, version
            except ssl.SSLError:
                assert not spoken, version


def test_browsers_are_told_to_come_by_tls_only(balancer: TlsBalancer) -> None:
    for path in ("/", "/nothing"):
        assert balancer.get(path).getheader("Strict-Transport-Security") == "max-age=31536000"


def test_whoever_comes_without_tls_is_sent_on(balancer: TlsBalancer) -> None:
    redirect = balancer.get("/page?userId=10001", port=balancer.redirect)
    assert redirect.status == 308
    assert redirect.getheader("Location") == f"https://localhost:{balancer.port}/page?userId=10001"
    assert redirect.getheader("Strict-Transport-Security") is None  # browsers ignore it over plain HTTP
    if balancer.program == "nginx":  # HAProxy closes plain HTTP on the port for TLS
        again = balancer.get("/page?userId=10001", port=balancer.port)
        assert (again.status, again.getheader("Location")) == (308, redirect.getheader("Location"))


async def test_the_private_key_is_nobody_elses_to_read(balancer: TlsBalancer) -> None:
    folder = balancer.process.log.parent
    kept = [path for path in folder.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    assert len(kept) == (1 if balancer.program == "haproxy" else 0)
    assert [path.stat().st_mode & 0o077 for path in kept] == [0] * len(kept)


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[int, list[dict[str, str]]]]:
    """A node that is ready and refuses all sockets; yields its port, and the headers of each handshake."""
    handshakes: list[dict[str, str]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        if " /ws" in request:
            handshakes.append({name.lower(): value for name, value in (line.split(": ", 1) for line in lines)})
        status = "200 OK" if " /readyz" in request else "404 Not Found"
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1")
    async with server:
        yield server.sockets[0].getsockname()[1], handshakes


@pytest.mark.parametrize("program", PROGRAMS)
async def test_a_node_sees_host_and_origin_as_the_browser_sent_them_and_who_came_how(
    program: Program, authority: Authority, certificate: Certificate, tmp_path: Path
) -> None:
    async with listening() as (port, handshakes):
        balancer = await asyncio.to_thread(start_balancer, tmp_path, program, authority, certificate, [port])
        with balancer.process:
            forged = {"X-Forwarded-For": "10.9.8.7", "X-Forwarded-Proto": "http"}
            with pytest.raises(InvalidStatus):
                async with connect(
                    f"{balancer.wss}?userId=10001",
                    ssl=authority.client(),
                    origin=f"https://localhost:{balancer.port}",  # type: ignore[arg-type] # a string of its own kind
                    additional_headers=forged,
                    proxy=None,
                ):
                    pass
    [headers] = handshakes
    assert headers["host"] == f"localhost:{balancer.port}"
    assert headers["origin"] == f"https://localhost:{balancer.port}"
    assert (headers["x-forwarded-for"], headers["x-forwarded-proto"]) == ("127.0.0.1", "https")


async def test_the_page_chooses_wss_when_it_came_by_https(balancer: TlsBalancer) -> None:
    with running_chromium("--ignore-certificate-errors") as chromium:
        async with open_page(chromium) as page:
            await page.visit(f"https://localhost:{balancer.port}/")
            await page.fill("#user", str(user_id(10003)))
            await page.press("Enter")
            await page.until("document.querySelector('#menu').dataset.state === 'online'")
            await page.fill("textarea", "why?")
            await page.press("Enter")
            await page.until("[...document.querySelectorAll('article')].at(-1)?.dataset.status === 'done'")
            assert page.complaints == []
    assert http_status(f"http://localhost:{balancer.port}/") != 200
