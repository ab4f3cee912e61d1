"""The addresses of nodes that `imstream balancer` follows, and its end."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from imstream.cli.balancer import BalancerConfig
from imstream.cli.following_balancer import FollowingBalancer, find_address
from imstream.settings import Settings
from imstream.store.leases import Holder


def holder(address: str) -> Holder:
    return Holder(instance="i", host="elsewhere", machine="", pid=1, address=address)


@pytest.mark.parametrize(
    "address", ["?", "http://[::1", "http://10.0.0.9", "http://10.0.0.9:0", "http://10.0.0.9:99999"]
)
async def test_a_malformed_address_is_reported(address: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is compared
        await find_address(holder(address), None)
    assert str(error.value).startswith(address)


async def test_a_name_with_several_addresses_keeps_the_one_that_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    ips = ["10.0.0.1", "10.0.0.2"]

    async def resolve(*_: object, **__: object) -> list[tuple[object, ...]]:
        ips.reverse()  # as a name server does
        return [(0, 0, 0, "", (ip, 8080)) for ip in ips]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    named = holder("http://name:8080")
    first = await find_address(named, None)
    assert first == "10.0.0.2:8080"
    assert [await find_address(named, first) for _ in range(3)] == [first] * 3
    ips[:] = ["10.0.0.3"]
    assert await find_address(named, first) == "10.0.0.3:8080"


async def test_a_signal_to_look_does_not_undo_the_one_to_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    looked = asyncio.Event()

    async def holders(*_: object) -> dict[str, Holder]:
        looked.set()
        return {}

    monkeypatch.setattr("imstream.cli.following_balancer.holders", holders)
    balancer = FollowingBalancer(Settings(), BalancerConfig("haproxy", "127.0.0.1:0", []), tmp_path)
    running = asyncio.create_task(balancer.run())
    await looked.wait()
    await asyncio.sleep(0)  # it waits for the next look
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGHUP)
    async with asyncio.timeout(10):
        assert await running == 0
