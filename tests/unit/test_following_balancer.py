"""The addresses of nodes that `imstream balancer` follows."""

import asyncio

import pytest

from imstream.cli.following_balancer import find_address
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
