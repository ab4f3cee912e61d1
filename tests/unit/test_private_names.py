"""Private names of libraries that imstream uses: an upgrade that removes one fails here, with a sentence."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

import aiohttp
from aiohttp.client_proto import ResponseHandler


def check(library: str, owner: object, *names: str, used_by: str) -> None:
    """Assert that an object of a library has attributes."""
    for name in names:
        where = owner.__name__ if isinstance(owner, type) else type(owner).__name__
        assert hasattr(owner, name), f"{library} {version(library)} has no {where}.{name}, which {used_by} uses"


async def test_aiohttp_has_the_names_that_bound_and_stream_a_response() -> None:
    used_by = "imstream/ai/bounded_http.py"
    loop = asyncio.get_running_loop()
    async with aiohttp.TCPConnector() as connector:
        check("aiohttp", connector, "_factory", used_by=used_by)
    handler = ResponseHandler(loop)
    check("aiohttp", handler, "_payload", "_buffer", "__len__", "exception", "set_response_params", used_by=used_by)
    reader = aiohttp.StreamReader(handler, limit=1, loop=loop)
    check("aiohttp", reader, "_protocol", "_read_nowait", "total_bytes", used_by=used_by)
