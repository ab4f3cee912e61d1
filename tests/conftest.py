"""Fixtures for all tests: real servers, and checks for leaks."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support import tiers
from tests.support.processes import free_port
from tests.support.servers import DemoBackend, RedisServer, missing, redis_6_binary, redis_7_binary, valkey_binary

# A background shell job ignores these signals, and processes under test would inherit that.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number is signal.SIGINT else signal.SIG_DFL)

SERVERS = {"valkey": valkey_binary, "redis-6.2": redis_6_binary, "redis-7.0": redis_7_binary}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--all`, which `ops/test --all` passes on."""
    parser.addoption("--all", action="store_true", help="run the second tier too: tests marked `long`")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the number of examples of properties."""
    tiers.load(second=config.getoption("--all"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the second tier unless `--all` is given, and run the slow folders first.

    Then no test process is left with a slow file at the end.
    """
    if not config.getoption("--all"):
        second = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if not item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=second)
    folders = ("journeys", "faults", "redis", "unit")
    items.sort(key=lambda item: folders.index(item.path.parent.name))


@pytest.fixture(scope="module")
def unmeasured() -> Iterator[None]:
    """Start processes without coverage, which halves their speed. Other tests cover the same code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # coverage's `patch = subprocess`
        yield


@pytest.fixture(scope="session")
def servers() -> Iterator[dict[str, RedisServer]]:
    """The Redis servers started so far, by name; they run until the end of the session."""
    started: dict[str, RedisServer] = {}
    yield started
    for server in started.values():
        server.stop()


@pytest.fixture
def redis_server(
    request: pytest.FixtureRequest, servers: dict[str, RedisServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer]:
    """An empty, shared Redis server: the embedded Valkey unless the test is parametrised over `SERVERS`."""
    name = getattr(request, "param", "valkey")
    if name not in servers:
        binary = SERVERS[name]()
        if binary is None:
            missing(name)
            return
        servers[name] = RedisServer(binary, free_port(), tmp_path_factory.mktemp(name))
        servers[name].start()
    server = servers[name]
    with server.client() as client:
        client.flushall()
        client.config_set("maxmemory", 0)
        client.acl_log_reset()
    yield server
    _check_keys(server)
    _check_permissions(server)


def _check_keys(server: RedisServer) -> None:
    """Check that every remaining key expires or is permanent by design."""
    with server.client() as client:
        forever = [key for key in client.scan_iter() if client.ttl(key) == -1]
    permanent = (":requests", ":load", ":dead", ":nodes", ":account")
    leaked = [key for key in forever if not key.endswith(permanent)]
    assert not leaked, f"keys that never expire: {leaked}"


def _check_permissions(server: RedisServer) -> None:
    """Check that no command was denied to the users of ops/redis-users.acl."""
    with server.client() as client:
        denied = [(entry["username"], entry["context"], entry["object"]) for entry in client.acl_log()]
    assert not denied, f"denied, and not in ops/redis-users.acl: {denied}"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoBackend]:
    """A fast demo AI backend."""
    from tests.support.servers import start_demo

    backend = start_demo(tmp_path_factory.mktemp("demo"), "--pace", "5ms")
    with backend.process:
        yield backend


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    """Check that no task of the test is left on the event loop."""
    before = asyncio.all_tasks()
    yield
    for _ in range(200):  # cancelled tasks need a few ticks, and more time on a busy machine
        remaining = asyncio.all_tasks() - before - {asyncio.current_task()}
        if not remaining:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"leaked tasks: {remaining}")
