"""`imstream balancer`: runs nginx or HAProxy on this machine in front of nodes, with or without TLS.

The configurations are those of `ops/`, which can be used directly. This module replaces the addresses, and enables the
lines marked `#tls` and `#redirect`.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal, NoReturn, get_args
from zlib import crc32

from imstream.errors import ImstreamError, SettingsError
from imstream.private_files import OWN_FOLDER, UMASK, close_to_others

Program = Literal["haproxy", "nginx"]

FOLDER = Path(f"{OWN_FOLDER}/balancer")
_CONFIGURATIONS: dict[Program, str] = {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}
_CERTIFICATE_AND_KEY = "certificate-and-key.pem"
NODES = "nodes.json"  # file with the nodes that were known last

_CONTENTS = (
    *(*_CONFIGURATIONS.values(), _CERTIFICATE_AND_KEY, NODES),
    *("haproxy.sock*", "nginx.pid", "body", "proxy", "fastcgi", "uwsgi", "scgi"),
)

# Values of the templates.
_LISTEN, _REDIRECT, _FIRST_NODE = "127.0.0.1:8000", "127.0.0.1:8001", "127.0.0.1:8080"
_CERTIFICATE, _KEY = "/etc/ssl/chat.example.com.pem", "/etc/ssl/chat.example.com.key"
_NODE_LINE = re.compile(r"\s*server 127\.0\.0\.1:\d+\b")
_MARKED = re.compile(r"(?P<indent>\s*)#(?P<mark>tls|redirect) (?P<line>.*)")
_ADDRESS = re.compile(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")
_FILE = re.compile(r"/[A-Za-z0-9._/@+-]+")
_PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin")
"""Searched in addition to PATH, which lacks the first two for ordinary users of Debian."""


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS for clients: PEM files, and address that redirects plain HTTP. Without `key`, `certificate` holds both."""

    certificate: Path
    key: Path | None = None
    redirect: str | None = None


@dataclass(frozen=True, slots=True)
class BalancerConfig:
    """The configuration of a load balancer. Addresses are `host:port`, with brackets around an IPv6 host."""

    program: Program
    listen: str
    nodes: Sequence[str]
    tls: Tls | None = None


def find_program(program: Program) -> str | None:
    """The path of a program; None if it is not installed."""
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *_PLACES]))


def installed_program() -> Program | None:
    """An installed program, if any: HAProxy before nginx, because its health checks are active."""
    return next((program for program in get_args(Program) if find_program(program)), None)


def render(config: BalancerConfig) -> str:
    """The text of the configuration file; raises SettingsError for malformed addresses and unusable files."""
    redirect = config.tls.redirect if config.tls else None
    for address in (config.listen, *config.nodes, *([redirect] if redirect else [])):
        if not is_address(address):
            raise SettingsError(f"{address!r} is not an address such as 10.0.0.1:8080 or [::1]:8080")
    template = (resources.files("imstream.cli") / _CONFIGURATIONS[config.program]).read_text("utf-8")
    return "\n".join([*_lines(config, template), ""])


def is_address(text: str) -> bool:
    """Whether a text is an address as in `BalancerConfig`."""
    return _ADDRESS.fullmatch(text) is not None


def _lines(config: BalancerConfig, template: str) -> Iterator[str]:
    values = _values(config)
    has_redirect = config.tls is not None and config.tls.redirect is not None
    for line in template.splitlines():
        marked = _MARKED.fullmatch(line)
        if _NODE_LINE.match(line):
            if _FIRST_NODE in line:
                for node, number in _server_ids(config.nodes).items():
                    made = line.replace(_FIRST_NODE, _format(config.program, node))
                    yield re.sub(r" id \d+$", f" id {number}", made)
        elif marked and config.tls and (marked["mark"] == "tls" or has_redirect):
            # All values at once: no value is replaced within another one.
            pattern = "|".join(map(re.escape, values))
            yield re.sub(pattern, lambda found: values[found[0]], f"{marked['indent']}{marked['line']}")
        elif config.tls is None or not line.strip().endswith((f" {_LISTEN}", f" {_LISTEN};")):
            yield line.replace(_LISTEN, values[_LISTEN]) if marked is None else line


def _server_ids(nodes: Sequence[str]) -> dict[str, int]:
    """HAProxy's number of each node. It decides the node's points on the ring, and does not depend on other nodes."""
    ids = dict[str, int]()
    for node in nodes:
        number = 1 + crc32(node.encode()) % 1_000_000
        while number in ids.values():
            number += 1
        ids[node] = number
    return ids


def _values(config: BalancerConfig) -> dict[str, str]:
    """The values that replace those of the template."""
    values = {_LISTEN: _format(config.program, config.listen)}
    if config.tls:
        values[_CERTIFICATE] = _readable(config.tls.certificate)
        values[_KEY] = _readable(config.tls.key or config.tls.certificate)
        values[":8000"] = f":{config.listen.rpartition(':')[2]}"
        if config.tls.key and config.program == "haproxy":
            raise SettingsError("HAProxy takes one file with the certificate, its chain and the key: leave out --key")
        if config.tls.redirect:
            values[_REDIRECT] = _format(config.program, config.tls.redirect)
    return values


def _format(program: Program, address: str) -> str:
    """An address in the program's syntax: HAProxy has no brackets, the port follows the last colon."""
    return address.replace("[", "").replace("]", "") if program == "haproxy" else address


def _readable(file: Path) -> str:
    path = str(file.resolve())
    if not os.access(path, os.R_OK):
        raise SettingsError(f"{file} cannot be read")
    if _FILE.fullmatch(path) is None:
        raise SettingsError(f"{path!r} cannot be named in a configuration: only letters, digits and ._/@+-")
    return path


def write_configuration(config: BalancerConfig, folder: Path) -> list[str]:
    """Write the configuration into `folder`, which is created if necessary; return the command that runs it."""
    path = find_program(config.program)
    if path is None:
        raise ImstreamError(f"{config.program} is not installed (Debian, Ubuntu: sudo apt install {config.program})")
    os.umask(UMASK)
    file = folder.resolve() / _CONFIGURATIONS[config.program]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        close_to_others(folder, _CONTENTS)
        if config.program == "haproxy" and config.tls and config.tls.key:
            config = replace(config, tls=replace(config.tls, certificate=_join_files(config.tls, folder), key=None))
        file.write_text(render(config), "utf-8")
    except OSError as error:
        raise SettingsError(f"--folder={folder} cannot be used: {error.strerror}: {error.filename}") from None
    if config.program == "nginx":
        return [path, "-e", "stderr", "-p", str(file.parent), "-c", str(file)]
    return [path, "-W", "-db", "-C", str(file.parent), "-f", str(file)]  # the path of the socket has to be short


def exec_balancer(config: BalancerConfig, folder: Path) -> NoReturn:
    """Replace this process by the load balancer, in the foreground."""
    command = write_configuration(config, folder)
    # HAProxy executes itself again by the name it was started with: a path, because PATH may lack its folder.
    os.execv(command[0], command)  # noqa: S606 - the purpose of this function


def _join_files(tls: Tls, folder: Path) -> Path:
    """Certificate and key in one file that only this user can read."""
    path = folder.resolve() / _CERTIFICATE_AND_KEY
    path.unlink(missing_ok=True)
    parts = [Path(_readable(file)).read_bytes() for file in (tls.certificate, tls.key) if file]
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(b"\n".join(parts))
    return path
