"""The page and the browser client, as a node serves them."""

import base64
import hashlib
import re
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette

from imstream.gateway.app import content_policy, page_routes
from imstream.user_ids import UserIds


@pytest.fixture
async def browser() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(Starlette(routes=page_routes(UserIds.NUMBER)))
    async with httpx.AsyncClient(transport=transport, base_url="http://node") as client:
        yield client


async def test_page_is_html_and_needs_nothing_but_itself_and_the_client(browser: httpx.AsyncClient) -> None:
    answer = await browser.get("/")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", answer.text)


async def test_policy_allows_the_inline_script_and_style_as_they_are_served(browser: httpx.AsyncClient) -> None:
    answer = await browser.get("/")
    policy = answer.headers["Content-Security-Policy"]
    for tag in ("script", "style"):
        [inline] = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe" not in policy


async def test_any_origin_may_import_the_client(browser: httpx.AsyncClient) -> None:
    answer = await browser.get("/imstream.js")
    assert answer.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def test_the_protocol_for_machines_is_served_to_any_origin(browser: httpx.AsyncClient) -> None:
    answer = await browser.get("/asyncapi.json")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert answer.json()["asyncapi"] == "3.0.0"


def test_policy_of_a_page_without_a_script_is_refused() -> None:
    with pytest.raises(ValueError, match="<script>"):
        content_policy("<style></style>")
