"""The HTTP routes of a node: health checks, and the page with its client, which may run nothing else."""

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from importlib import resources

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from imstream.gateway.frame_handler import SessionDeps
from imstream.user_ids import UserIds

_STATIC = resources.files("imstream.gateway") / "static"

_HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def make_app(deps: SessionDeps, *, stuck: Callable[[], str | None]) -> Starlette:
    """The ASGI application of one node. `stuck`: why the node cannot recover by itself; None when it can."""
    node = deps.settings.node

    def report(body: dict[str, object], why: str | None) -> JSONResponse:
        return JSONResponse(body if why is None else {**body, "why": why}, status_code=200 if why is None else 503)

    async def readyz(_: Request) -> JSONResponse:
        why = deps.not_ready()
        body = {
            "ready": why is None,
            "node": node,
            "sessions": len(deps.registry),
            "running": len(deps.jobs),
            "refused": deps.guards.rejections,
        }
        return report(body, why)

    async def healthz(_: Request) -> JSONResponse:
        why = stuck()
        return report({"alive": why is None, "node": node}, why)

    # Handshakes do not come here.
    only_sockets = Response("WebSockets only", 426, {"Connection": "Upgrade", "Upgrade": "websocket"})
    routes = [Route("/readyz", readyz), Route("/healthz", healthz), Route("/ws", only_sockets, methods=["GET"])]
    return Starlette(routes=[*routes, *page_routes(deps.settings.user_ids)])


def page_routes(user_ids: UserIds) -> list[Route]:
    """The routes of the page at `/`, of the browser client, and of the protocol for machines (AsyncAPI)."""
    page = (_STATIC / "index.html").read_text("utf-8")
    page = page.replace('data-user-ids="number"', f'data-user-ids="{user_ids}"')
    client = (_STATIC / "imstream.js").read_text("utf-8")
    protocol = (_STATIC / "asyncapi.json").read_text("utf-8")
    any_page = {"Access-Control-Allow-Origin": "*"}
    return [
        _route("/", page, "text/html; charset=utf-8", {"Content-Security-Policy": content_policy(page)}),
        # Any page may use the client. Our own needs that when it was opened from disk: browsers let it import only
        # what a server allows to every origin.
        _route("/imstream.js", client, "text/javascript; charset=utf-8", any_page),
        _route("/asyncapi.json", protocol, "application/json", any_page),
    ]


def content_policy(page: str) -> str:
    """The Content-Security-Policy of the page: its own inline script and style by their hashes, no HTML from strings.

    The socket may connect to any address, because the user can enter another node on the page.
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


def _route(path: str, content: str, media_type: str, headers: Mapping[str, str]) -> Route:
    return Route(path, Response(content, media_type=media_type, headers={**_HEADERS, **headers}), methods=["GET"])
