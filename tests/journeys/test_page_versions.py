"""The page while nodes of two releases run behind one load balancer."""

import asyncio
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from imstream.gateway.app import page_routes
from imstream.user_ids import UserIds
from tests.journeys.page_support import Page
from tests.support.processes import free_port
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

STATIC = Path(str(resources.files("imstream.gateway") / "static"))


def release(folder: Path, name: str) -> ASGIApp:
    """The page of a release, all of whose files have its name."""
    shutil.copytree(STATIC, folder)
    for file in folder.glob("*.js"):
        mark = f"(globalThis.releases ??= new Set()).add('{name}');"
        file.write_text(file.read_text("utf-8") + (mark if file.name != "boot.js" else ""), "utf-8")
    styles = folder / "page.css"
    styles.write_text(styles.read_text("utf-8") + f":root {{ --release: {name}; }}", "utf-8")
    page = folder / "index.html"
    page.write_text(page.read_text("utf-8").replace("<html ", f'<html data-release="{name}" '), "utf-8")
    return Starlette(routes=page_routes(UserIds.NUMBER, 65536, 200, folder))


@asynccontextmanager
async def balanced(*nodes: ASGIApp) -> AsyncIterator[str]:
    """The address of a balancer that sends each request to any of these."""
    choose = random.Random(7)  # noqa: S311 - no secret

    async def balancer(scope: Scope, receive: Receive, send: Send) -> None:
        await choose.choice(nodes)(scope, receive, send)

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(balancer, port=port, log_config=None, lifespan="off"))
    serving = asyncio.create_task(server.serve())
    try:
        await wait_until(lambda: server.started, "the page is served")
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        await serving


async def test_files_of_two_releases_are_never_mixed(page: Page, tmp_path: Path) -> None:
    async with balanced(release(tmp_path / "a", "a"), release(tmp_path / "b", "b")) as address:
        await page.call("Page.navigate", url=address)
        await page.until("document.querySelector('#language')?.textContent")  # the last thing that page.js does
        loaded = await page.evaluate(
            "[[...releases], document.documentElement.dataset.release,"
            " getComputedStyle(document.documentElement).getPropertyValue('--release').trim()]"
        )
        assert loaded in ([["a"], "a", "a"], [["b"], "b", "b"])
    page.forgive("404 (Not Found)", "Refused to apply style")  # of another version
