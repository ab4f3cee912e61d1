"""URLs of Redis (one server, Sentinel, Cluster), and URLs shown without their secrets. No I/O."""

import re
import socket
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self, cast
from urllib.parse import parse_qsl, urlencode

from pydantic import SecretStr

ALLOWED = (
    "redis://[user:password@]host[:port][/db], "
    "redis+sentinel://[user:password@]host:port,host:port/<service name>[/db] or "
    "redis+cluster://[user:password@]host:port,host:port; with TLS rediss, rediss+sentinel, rediss+cluster"
)

Topology = Literal["server", "sentinel", "cluster"]


class SecretUrl(SecretStr):
    """A URL that may hold a password: `str` and `repr` leave it out, `get_secret_value` returns the whole URL."""

    def __str__(self) -> str:
        return redact_url(self.get_secret_value())

    def __repr__(self) -> str:
        return f"SecretUrl({str(self)!r})"


_URL = re.compile(
    r"(?P<scheme>rediss?)(\+(?P<topology>sentinel|cluster))?://((?P<login>[^/?#]*)@)?(?P<hosts>[^/?#@]*)"
    r"(/(?P<path>[^?#]*))?(\?(?P<query>[^#]*))?"
)
MIN_SECRET = 8  # characters of a value that is taken for a secret because of its name
_SECRET_IN_QUERY = re.compile(r"(?P<name>[?&][^=&#]*(password|secret|token|key|sig)=)[^&#]*", re.IGNORECASE)
_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+)(:(?P<port>[0-9]{1,5}))?")
_PATHS = {
    "server": re.compile(r"(?P<db>[0-9]*)"),
    "sentinel": re.compile(r"(?P<service>[A-Za-z0-9._-]+)(/(?P<db>[0-9]*))?"),
    "cluster": re.compile(r"0?"),
}

_OF_SENTINEL = ("sentinel_username", "sentinel_password")
_OPTIONS = (
    *("username", "password", "password_file", "client_name", "protocol"),
    *("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"),
)
"""Query options that are passed to redis-py; others could override settings such as time limits."""

_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_CERT_REQS = ("required", "none")


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A parsed Redis URL."""

    topology: Topology
    servers: tuple[tuple[str, int], ...]  # host and port of the server, of each Sentinel, or of some nodes
    service: str  # Sentinel's name of the master
    sentinel_login: dict[str, str] = field(repr=False)  # user and password of the Sentinels themselves, if given
    password_file: Path | None  # file with the password, read for each connection
    _scheme: str
    _login: str = field(repr=False)
    _db: str
    _query: str = field(repr=False)

    @classmethod
    def parse(cls, url: str | SecretUrl) -> Self:
        """Parse a URL, or raise `ValueError` naming the allowed forms."""
        match = _URL.fullmatch(url if isinstance(url, str) else url.get_secret_value())
        if match is None:
            raise ValueError(ALLOWED)
        topology = cast("Topology", match["topology"] or "server")
        path = _PATHS[topology].fullmatch(match["path"] or "")
        servers = tuple(_server(each, 26379 if topology == "sentinel" else 6379) for each in match["hosts"].split(","))
        if path is None or (topology == "server" and len(servers) > 1):
            raise ValueError(ALLOWED)
        query = dict(parse_qsl(match["query"] or "", keep_blank_values=True))
        options = (*_OPTIONS, *_OF_SENTINEL) if topology == "sentinel" else _OPTIONS
        if unknown := sorted(set(query) - set(options)):
            raise ValueError(f"behind ? only {', '.join(options)}; not {', '.join(unknown)}")
        if match["scheme"] == "redis" and any(name.startswith("ssl_") for name in query):
            raise ValueError("ssl_… only with rediss, rediss+sentinel or rediss+cluster: this is not encrypted")
        for name in _FILES:
            if name in query and not Path(query[name]).is_file():
                raise ValueError(f"{name}: there is no file {query[name]}")
        if query.get("ssl_cert_reqs", "required") not in _CERT_REQS:
            raise ValueError(f"ssl_cert_reqs is one of {', '.join(_CERT_REQS)}")
        password_file = query.pop("password_file", None)
        if password_file is not None and (":" in (match["login"] or "") or "password" in query):
            raise ValueError("a password or password_file, not both")
        named = path.groupdict()
        return cls(
            topology=topology,
            servers=servers,
            service=named.get("service") or "",
            sentinel_login={name.removeprefix("sentinel_"): query.pop(name) for name in _OF_SENTINEL if name in query},
            password_file=Path(password_file) if password_file else None,
            _scheme=match["scheme"],
            _login=f"{match['login']}@" if match["login"] else "",
            _db=named.get("db") or "0",
            _query=f"?{urlencode(query)}" if query else "",
        )

    def server_url(self, host: str, port: int) -> str:
        """Build the URL of one server, with the user, password, database and TLS options of this URL."""
        shown = f"[{host}]" if ":" in host else host
        return f"{self._scheme}://{self._login}{shown}:{port}/{self._db}{self._query}"


def validate_redis_url(url: SecretUrl) -> SecretUrl:
    """Return the URL, or raise `ValueError` naming the allowed forms."""
    RedisUrl.parse(url)
    return url


def secrets_in_query(url: str) -> list[str]:
    """The values of secret parameters in the query of a URL, as they are written in it; short ones are not secret."""
    values = (match[0].partition("=")[2] for match in _SECRET_IN_QUERY.finditer(url))
    return [value for value in values if len(value) >= MIN_SECRET]


def redact_url(url: str) -> str:
    """Remove user and password from any URL, and the values of secret parameters from its query."""
    return _SECRET_IN_QUERY.sub(r"\g<name>…", re.sub(r"(?<=//).*@", "", url))


def _server(text: str, default_port: int) -> tuple[str, int]:
    match = _HOST.fullmatch(text)
    port = int(match["port"] or default_port) if match else 0
    if match is None or not 0 < port < 65536:  # noqa: PLR2004 - TCP ports
        raise ValueError(ALLOWED)
    return match["host"].strip("[]"), port


ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not bound to
"""Hosts that listen on every address, each with the one at which this machine reaches them."""


def host_from_here(host: str, machine: str) -> str | None:
    """Where a listener on `host` of a machine (its host name) is reached from this one; None: only from there."""
    is_here = machine == socket.gethostname()
    if host in ANY_ADDRESS:
        return "127.0.0.1" if is_here else machine
    return host if is_here or not is_loopback(host) else None


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
