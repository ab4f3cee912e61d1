"""The page and the browser client, as a node serves them."""

import re
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette

from imstream.gateway.app import page_routes
from imstream.user_ids import UserIds


@pytest.fixture
async def browser() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(Starlette(routes=page_routes(UserIds.NUMBER, 1234, 56)))
    async with httpx.AsyncClient(transport=transport, base_url="http://node") as client:
        yield client


async def test_page_is_html_and_needs_nothing_but_its_own_files(browser: httpx.AsyncClient) -> None:
    answer = await browser.get("/")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", answer.text)
    assert 'data-max-frame="1234" data-max-history="56"' in answer.text
    for name, media_type in (("page.css", "text/css"), ("boot.js", "text/javascript"), ("page.js", "text/javascript")):
        assert (await browser.get(f"/{name}")).headers["Content-Type"] == f"{media_type}; charset=utf-8"
    for hidden in ("package.json", "imstream.d.ts", "index.html"):
        assert (await browser.get(f"/{hidden}")).status_code == 404


async def test_scripts_import_only_files_that_are_served(browser: httpx.AsyncClient) -> None:
    seen, wanted = set[str](), {"page.js"}
    while unread := wanted - seen:
        for name in unread:
            answer = await browser.get(f"/{name}")
            assert answer.status_code == 200, name
            wanted |= set(re.findall(r'^import .* from "\./([^"]+)"', answer.text, re.MULTILINE))
            seen.add(name)
    assert {"imstream.js", "page-chat.js"} <= {name.partition("?")[0] for name in seen}


async def test_page_names_files_of_its_own_version_which_browsers_keep(browser: httpx.AsyncClient) -> None:
    page = (await browser.get("/")).text
    files = re.findall(r'<link [^>]*href="([a-z-]+\.(?:js|css)\?v=\w+)"', page)
    [version] = {name.partition("?v=")[2] for name in files}
    for name in files:
        answer = await browser.get(f"/{name}")
        assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
        assert set(re.findall(r'^import .* from "\./[a-z-]+\.js(.*)";', answer.text, re.MULTILINE)) <= {f"?v={version}"}
    assert {"page.css", "page.js", "imstream.js"} <= {name.partition("?")[0] for name in files}
    assert (await browser.get("/page.js?v=0123456789ab")).status_code == 404  # of another release
    for always_there in ("/", "/boot.js", "/page.js", "/imstream.js"):
        assert (await browser.get(always_there)).headers["Cache-Control"] == "no-cache"


async def test_policy_allows_nothing_inline_and_the_page_has_nothing_inline(browser: httpx.AsyncClient) -> None:
    answer = await browser.get("/")
    policy = answer.headers["Content-Security-Policy"]
    assert "script-src 'self';" in policy
    assert "style-src 'self';" in policy
    assert "unsafe" not in policy
    assert re.findall(r"<script\b[^>]*>([^<]+)</script>|<style| style=| on\w+=", answer.text) == []


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
