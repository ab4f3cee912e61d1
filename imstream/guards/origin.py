"""Which browser pages may open sockets: browsers send the origin of the page (RFC 6454), which pages cannot change.

The origin `null` identifies no page: files opened from disk have it, but also a sandboxed frame of any page. Where
clients are not authenticated, such pages must therefore log in with the page token of the settings.
"""

import hmac
import re
from collections.abc import Collection, Mapping
from typing import Self

from pydantic import SecretStr
from yarl import URL

from imstream.codes import CloseCode, Code
from imstream.errors import SettingsError
from imstream.guards.guard import ALLOW, Allow, Guard, GuardDeps, LoginAttempt, Reject
from imstream.settings import Settings
from imstream.texts import Sentence

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")

NULL = "null"

_REJECTED = Reject(
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
    """Rejects browser pages whose origin is not allowed. Other clients send no origin and are not affected."""

    def __init__(self, origins: Collection[str], *, authenticated: bool, page_token: SecretStr | None) -> None:
        self._origins = frozenset(origins)
        self._authenticated = authenticated
        self._page_token = page_token

    @classmethod
    def create(cls, deps: GuardDeps) -> Self | None:
        settings = deps.settings
        origins, authenticated = parse_origins(settings.origins), settings.auth != "none"
        if NULL in origins and not authenticated and settings.page_token is None:
            variable = Settings.variable
            raise SettingsError(
                f"{variable('origins')}={settings.origins!r} is not allowed with {variable('auth')}=none, because a "
                f"frame of any page has the origin null: set {variable('page_token')} to the token of such pages"
            )
        if "*" in origins and authenticated:
            return None
        return cls(origins, authenticated=authenticated, page_token=settings.page_token)

    def check_handshake(self, headers: Mapping[str, str]) -> Reject | None:
        origin = headers.get("origin")
        if origin is None or _canonical(origin) in self._origins:
            return None
        if origin == NULL and not self._authenticated and self._page_token is None:
            return _REJECTED
        allowed = "*" in self._origins or ("same" in self._origins and is_same(origin, headers))
        return None if allowed else _REJECTED

    async def check_login(self, login: LoginAttempt) -> Allow | Reject:
        """Check the page token of pages with the origin null, where clients are not authenticated."""
        if login.origin != NULL or self._authenticated:
            return ALLOW
        if self._page_token is None:
            return _NO_TOKEN
        given = (login.token or "").encode(errors="surrogatepass")
        expected = self._page_token.get_secret_value().encode(errors="surrogatepass")
        return ALLOW if hmac.compare_digest(given, expected) else _NO_TOKEN


def parse_origins(text: str) -> list[str]:
    """The origins of the setting, in the form that browsers send. Raises `SettingsError`."""
    origins = [_canonical(part.strip().lower()) for part in text.split(",")]
    if None in origins or ("*" in origins and len(origins) > 1):
        raise SettingsError(
            f"{Settings.variable('origins')}={text!r} is not allowed: a list with commas of same, null, or origins "
            "such as https://chat.example.com; or * alone"
        )
    return [origin for origin in origins if origin is not None]


def _canonical(origin: str) -> str | None:
    """An origin without the default port of its scheme; None for text that is not an origin."""
    if origin in {"same", NULL, "*"}:
        return origin
    try:
        return str(URL(origin)) if _ORIGIN.fullmatch(origin) else None
    except ValueError:
        return None


def is_same(origin: str, headers: Mapping[str, str]) -> bool:
    """Whether the page's origin is the address that the handshake was sent to.

    Balancers forward the browser's `Host`. Only the balancer that terminates TLS has the scheme, and may send it.
    """
    scheme, page = origin.partition(":")[0], _canonical(origin)
    target_scheme = headers.get("x-forwarded-proto", "").partition(",")[0].strip()  # the outermost of several balancers
    if scheme not in {"http", "https"} or (scheme == "http" and target_scheme in {"https", "wss"}):
        return False  # the latter: a page that anyone on the network path may have changed
    return page is not None and page == _canonical(f"{scheme}://{headers.get('host', '').lower()}")
