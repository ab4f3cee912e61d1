"""The HTTP routes of a node: health checks, metrics, and the page with its client, which may run nothing else."""

import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from imstream.gateway.session_deps import SessionDeps
from imstream.guards.authentication import is_local
from imstream.metrics import Metrics
from imstream.urls import is_loopback
from imstream.user_ids import UserIds

_STATIC = resources.files("imstream.gateway") / "static"

_INDIRECT = re.compile(r"forwarded|x-forwarded|x-real-ip|x-client-ip|x-original-|true-client-ip|cf-|via|origin")
"""Beginnings of headers that proxies add, and of the one that identifies a page."""

_MEDIA_TYPES = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8", "json": "application/json"}

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src ws: wss:; "  # to any address, because the user can enter another node on the page
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""The Content-Security-Policy of the page: its own files, nothing inline, no HTML from strings."""

_HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

# Any page may use the client. Our own needs that when it was opened from disk: browsers let it import only what a
# server allows to every origin.
_ANY_PAGE = {"Access-Control-Allow-Origin": "*"}

_FOREVER = {"Cache-Control": "public, max-age=31536000, immutable"}

_OTHER_VERSION = Response(status_code=404, headers=_HEADERS | _ANY_PAGE)

_IMPORT = re.compile(r'^(import .+ from "\./[a-z-]+\.js)(?=";$)', re.MULTILINE)


def make_app(deps: SessionDeps, *, stuck: Callable[[], str | None]) -> Starlette:
    """The ASGI application of one node. `stuck`: why the node cannot recover by itself; None when it can.

    Metrics, and details of health checks, are served here only without a setting, and only to this machine.
    """
    # Handshakes do not come here.
    only_sockets = Response("WebSockets only", 426, {"Connection": "Upgrade", "Upgrade": "websocket"})
    app = Starlette(
        routes=[
            *operator_routes(
                deps, stuck=stuck, shows=is_from_here if deps.settings.shows_metrics_here else lambda _: False
            ),
            Route("/ws", only_sockets, methods=["GET"]),
            *page_routes(deps.settings.user_ids, deps.settings.max_frame, deps.settings.max_history),
        ]
    )
    app.router.redirect_slashes = False  # it would reveal which paths exist
    return app


def make_metrics_app(deps: SessionDeps, *, stuck: Callable[[], str | None]) -> Starlette:
    """The ASGI application of the listener of metrics."""
    return Starlette(routes=operator_routes(deps, stuck=stuck, shows=lambda _: True))


def operator_routes(
    deps: SessionDeps, *, stuck: Callable[[], str | None], shows: Callable[[Request], bool]
) -> list[Route]:
    """Health checks: the verdict for every client, details for operators only. `shows`: whether a request is theirs."""
    node = deps.settings.node

    def report(request: Request, verdict: str, why: str | None, details: Mapping[str, object]) -> JSONResponse:
        body: dict[str, object] = {verdict: why is None}
        if shows(request):
            body |= details if why is None else {**details, "why": why}
        return JSONResponse(body, status_code=200 if why is None else 503)

    async def readyz(request: Request) -> JSONResponse:
        counts = {"sessions": len(deps.registry), "running": len(deps.jobs), "refused": deps.guards.rejections}
        return report(request, "ready", deps.not_ready(), {"node": node, **counts})

    async def healthz(request: Request) -> JSONResponse:
        return report(request, "alive", stuck(), {"node": node})

    metrics = _Exposition(deps.metrics, shows)
    return [Route("/readyz", readyz), Route("/healthz", healthz), Route("/metrics", metrics)]


@dataclass(frozen=True, slots=True)
class _Exposition:
    """The metrics. To others, the path is unknown: an ASGI application gets requests of all methods, as those do."""

    metrics: Metrics
    shows: Callable[[Request], bool]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        if not self.shows(request):
            raise HTTPException(404)
        content, media_type = self.metrics.expose(request.headers.get("accept", ""))
        await Response(content, headers={"Content-Type": media_type, "Cache-Control": "no-store"})(scope, receive, send)


def is_from_here(request: Request) -> bool:
    """Whether a request was made on this machine: no proxy has forwarded it, and no page of a browser has sent it."""
    headers = request.headers
    return (
        request.client is not None
        and is_loopback(request.client.host)
        and request.scope["http_version"] != "1.0"  # as nginx, which by default has no other sign of forwarding
        and "upgrade" not in headers.get("connection", "").lower()  # as nginx where it is set up for sockets
        and is_local(headers)
        and not any(map(_INDIRECT.match, headers))
        and headers.get("sec-fetch-site", "none") == "none"
    )


def page_routes(user_ids: UserIds, max_frame: int, max_history: int, folder: Traversable = _STATIC) -> list[Route]:
    """The routes of the page at `/`, its files, the browser client, and the protocol for machines (AsyncAPI).

    The page and its modules name each file that they need with a version, `?v=…`, and a node has only files of its own
    version. So while nodes of two releases run, their files are not mixed; the page is loaded again instead (boot.js).
    """
    kinds = {file.name: _MEDIA_TYPES.get(file.name.rpartition(".")[2]) for file in folder.iterdir()}
    files = {name: (folder / name).read_text("utf-8") for name in sorted(kinds)}
    version = hashlib.sha256("".join(files.values()).encode()).hexdigest()[:12]
    modules = [name for name in files if name.endswith(".js") and name != "boot.js"]
    links = [f'<link rel="modulepreload" href="{name}?v={version}">' for name in modules]
    links.insert(0, f'<link rel="stylesheet" href="page.css?v={version}">')
    page = files["index.html"].replace('<link rel="stylesheet" href="page.css">', "\n".join(links))
    page = page.replace('data-user-ids="number"', f'data-user-ids="{user_ids}"')
    page = page.replace('data-max-frame="65536"', f'data-max-frame="{max_frame}"')
    page = page.replace('data-max-history="200"', f'data-max-history="{max_history}"')
    policy = {"Content-Security-Policy": _POLICY}
    return [
        Route("/", Response(page, media_type="text/html; charset=utf-8", headers=_HEADERS | policy), methods=["GET"]),
        *(
            Route(f"/{name}", _file(_IMPORT.sub(rf"\1?v={version}", text), media_type, version), methods=["GET"])
            for name, text in files.items()
            if (media_type := kinds[name]) and name != "package.json"
        ),
    ]


def _file(content: str, media_type: str, version: str) -> Callable[[Request], Awaitable[Response]]:
    newest = Response(content, media_type=media_type, headers=_HEADERS | _ANY_PAGE)
    forever = Response(content, media_type=media_type, headers=_HEADERS | _ANY_PAGE | _FOREVER)
    answers = {"": newest, version: forever}

    async def answer(request: Request) -> Response:
        return answers.get(request.query_params.get("v", ""), _OTHER_VERSION)

    return answer
