"""Which pages may open sockets: a browser names the origin of the page (RFC 6454), and pages cannot change it.

The origin `null` tells nothing: a page opened from disk has it, and so has a sandboxed frame of any page in the world.
So it is not enough where clients are not authenticated: then such a page must show a token of this node's settings.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Collection, Mapping
from typing import ClassVar, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import SecretStr

from imstream.errors import SettingsError
from imstream.guards.guard import ALLOW, Allow, Guard, GuardDeps, Handshake, LoginAttempt, Reject
from imstream.settings import Settings
from imstream.texts import Sentence
from imstream.wire import CloseCode, Code

_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_ALLOWED = "a list with commas of same, null, or origins such as https://chat.example.com; or * alone"

NULL = "null"

_REFUSAL = Reject(
    "origin",
    Code.FORBIDDEN,
    Sentence("不允许此来源的网页连接 (IMSTREAM_ORIGINS)", "Pages of this origin may not connect (IMSTREAM_ORIGINS)"),
)


_NO_TOKEN = Reject(
    "page_token",
    Code.UNAUTHORIZED,
    Sentence("请用令牌 (token) 登录 (IMSTREAM_PAGE_TOKEN)", "Please log in with a token (IMSTREAM_PAGE_TOKEN)"),
    close=CloseCode.NOT_AUTHENTICATED,
)


class Origin(Guard):
    """Accepts the pages of some origins. Clients that are no browsers name none, and are not concerned."""

    order: ClassVar[int] = 5

    def __init__(self, origins: Collection[str], *, authenticated: bool, page_token: SecretStr | None) -> None:
        self._origins = frozenset(origins)
        self._authenticated = authenticated
        self._page_token = page_token

    @classmethod
    def make(cls, supplies: GuardDeps) -> Self | None:
        """See `Guard`."""
        settings = supplies.settings
        origins, authenticated = parse_origins(settings.origins), settings.auth != "none"
        if NULL in origins and not authenticated and settings.page_token is None:
            variable = Settings.variable
            raise SettingsError(
                f"{variable('origins')}={settings.origins!r} is not allowed with {variable('auth')}=none, because a "
                f"frame of any page has the origin null: set {variable('page_token')} to what such pages must show"
            )
        if "*" in origins and authenticated:
            return None
        return cls(origins, authenticated=authenticated, page_token=settings.page_token)

    def handshake(self, handshake: Handshake) -> Reject | None:
        """Refuse the pages of other origins."""
        origin = handshake.headers.get("origin")
        if origin is None or origin in self._origins:
            return None
        if origin == NULL and not self._authenticated and self._page_token is None:
            return _REFUSAL
        allowed = "*" in self._origins or ("same" in self._origins and is_same(origin, handshake.headers))
        return None if allowed else _REFUSAL

    async def login(self, login: LoginAttempt) -> Allow | Reject:
        """Refuse a page of the origin null without the token, where nothing else tells who it is."""
        if login.origin != NULL or self._authenticated:
            return ALLOW
        shown, wanted = login.token or "", self._page_token
        if wanted is not None and hmac.compare_digest(_as_bytes(shown), _as_bytes(wanted.get_secret_value())):
            return ALLOW
        return _NO_TOKEN


def parse_origins(text: str) -> list[str]:
    """The origins of the setting, as browsers write them. Raises `SettingsError`."""
    origins = [_as_browsers_do(part.strip().lower()) for part in text.split(",")]
    if None in origins or ("*" in origins and len(origins) > 1):
        raise SettingsError(f"{Settings.variable('origins')}={text!r} is not allowed: {_ALLOWED}")
    return [origin for origin in origins if origin is not None]


def _as_browsers_do(origin: str) -> str | None:
    """An origin without the port that its scheme has anyway; None when it is none."""
    if origin in {"same", "null", "*"}:
        return origin
    if _ORIGIN.fullmatch(origin) is None:
        return None
    parts = _split(origin)
    port = "" if parts is None or parts.port is None or parts.port == _PORTS.get(parts.scheme) else f":{parts.port}"
    return None if parts is None else f"{parts.scheme}://{parts.netloc.removesuffix(f':{parts.port}')}{port}"


def is_same(origin: str, headers: Mapping[str, str]) -> bool:
    """Whether a page comes from where its handshake goes.

    Balancers hand on the `Host` that the browser asked for. The scheme is known only to who ended TLS, who may say so.
    """
    page, asked = _split(origin), _split(f"//{headers.get('host', '')}")
    if page is None or asked is None or page.scheme not in {"http", "https"} or not _ORIGIN.fullmatch(origin):
        return False
    asked_by = headers.get("x-forwarded-proto", "").partition(",")[0].strip()  # of several balancers, the outermost
    if page.scheme == "http" and asked_by in {"https", "wss"}:
        return False  # a page that anybody on the way may have changed
    usual = _PORTS[page.scheme]
    return page.hostname is not None and (page.hostname, page.port or usual) == (asked.hostname, asked.port or usual)


def _as_bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _split(url: str) -> SplitResult | None:
    """The parts of a URL with a port that is a number; None when there are none."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts
