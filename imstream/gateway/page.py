"""The page of a node and the browser client, with headers under which a browser runs these two and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_STATIC = resources.files("imstream.gateway") / "static"

_HEADERS = {
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def page_routes() -> list[Route]:
    """The routes of the page at `/` and of the browser client at `/imstream.js`."""
    page = (_STATIC / "index.html").read_text("utf-8")
    client = (_STATIC / "imstream.js").read_text("utf-8")
    return [
        Route("/", _serving(page, "text/html; charset=utf-8", {"Content-Security-Policy": content_policy(page)})),
        # Anybody's page may use the client. The page itself needs that when it was opened from disk: browsers let it
        # import nothing but what a server allows to every origin.
        Route("/imstream.js", _serving(client, "text/javascript; charset=utf-8", {"Access-Control-Allow-Origin": "*"})),
    ]


def content_policy(page: str) -> str:
    """The Content-Security-Policy of the page: its own inline script and style by their hashes, no HTML from strings.

    The socket may go to any address, because the page lets a person type in another node.
    """
    return "; ".join((
        "default-src 'none'",
        f"script-src 'self' {_hash_of('script', page)}",
        f"style-src {_hash_of('style', page)}",
        "img-src data:",
        "connect-src ws: wss:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ))  # fmt: skip


def _hash_of(tag: str, page: str) -> str:
    found = re.search(rf"<{tag}[^>]*>(.*?)</{tag}>", page, re.DOTALL)
    if found is None:
        raise ValueError(f"the page has no <{tag}>")
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"


def _serving(content: str, media_type: str, headers: Mapping[str, str]) -> Callable[[Request], Awaitable[Response]]:
    async def serve(_: Request) -> Response:  # else starlette would call it in a thread
        return Response(content, media_type=media_type, headers={**_HEADERS, **headers})

    return serve
