"""`imstream balancer`: the nginx or HAProxy of this machine in front of some nodes, with or without TLS.

The configurations are those of `ops/`, which are usable as they are; for other nodes only addresses are replaced, and
for TLS the lines marked `#tls` and `#redirect` are made use of.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal, NoReturn, get_args

from imstream.errors import ImstreamError, SettingsError
from imstream.private_files import OWN_FOLDER, UMASK, close_to_others

Program = Literal["haproxy", "nginx"]

FOLDER = Path(f"{OWN_FOLDER}/balancer")
"""Where the configuration and the temporary files of a running one are kept, unless another folder is named."""

_CONFIGURATIONS: dict[Program, str] = {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}
_JOINED = "certificate-and-key.pem"
_CONTENTS = (*_CONFIGURATIONS.values(), _JOINED, "nginx.pid", "body", "proxy", "fastcgi", "uwsgi", "scgi")
"""What is kept in the folder."""

_LISTEN = "127.0.0.1:8000"
_REDIRECT = "127.0.0.1:8001"
_FIRST_NODE = "127.0.0.1:8080"
_CERTIFICATE = "/etc/ssl/chat.example.com.pem"
_KEY = "/etc/ssl/chat.example.com.key"
_NODE_LINE = re.compile(r"\s*server 127\.0\.0\.1:\d+\b")
_MARKED = re.compile(r"(?P<indent>\s*)#(?P<mark>tls|redirect) (?P<line>.*)")
_ADDRESS = re.compile(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")
_FILE = re.compile(r"/[A-Za-z0-9._/@+-]+")
_PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin")
"""Where the programs are, besides PATH: that of an ordinary user of Debian lacks the first two."""


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS for those who connect.

    Attributes:
        certificate: PEM file of the certificate and its chain.
        key: PEM file of its private key; None when that is in the same file.
        redirect: Address at which those who come without TLS are sent on, if any.
    """

    certificate: Path
    key: Path | None = None
    redirect: str | None = None


@dataclass(frozen=True, slots=True)
class Front:
    """What a balancer is to be. All addresses are `host:port`, with brackets around an IPv6 host.

    Attributes:
        program: Which one.
        listen: The address it listens on.
        nodes: The addresses of the nodes.
    """

    program: Program
    listen: str
    nodes: Sequence[str]
    tls: Tls | None = None


def find(program: Program) -> str | None:
    """The path of a program; None when it is not installed."""
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *_PLACES]))


def installed() -> Program | None:
    """The program to take when either will do: HAProxy before nginx, because its health checks are active."""
    return next((program for program in get_args(Program) if find(program)), None)


def configuration(front: Front) -> str:
    """The configuration.

    Raises:
        SettingsError: An address is none, or a file cannot be read or named in a configuration.
    """
    addresses = [front.listen, *front.nodes, *([front.tls.redirect] if front.tls and front.tls.redirect else [])]
    for address in addresses:
        if _ADDRESS.fullmatch(address) is None:
            raise SettingsError(f"{address!r} is no address such as 10.0.0.1:8080 or [::1]:8080")
    text = (resources.files("imstream.cli") / _CONFIGURATIONS[front.program]).read_text("utf-8")
    return "\n".join([*_lines(front, text), ""])


def _lines(front: Front, template: str) -> Iterator[str]:
    words = _words(front)
    redirect = front.tls is not None and front.tls.redirect is not None
    for line in template.splitlines():
        marked = _MARKED.fullmatch(line)
        if _NODE_LINE.match(line):
            if _FIRST_NODE in line:
                yield from (line.replace(_FIRST_NODE, _shown(front.program, node)) for node in front.nodes)
        elif marked and front.tls and (marked["mark"] == "tls" or redirect):
            yield _replaced(f"{marked['indent']}{marked['line']}", words)
        elif front.tls is None or not line.strip().endswith((f" {_LISTEN}", f" {_LISTEN};")):
            yield line.replace(_LISTEN, words[_LISTEN]) if marked is None else line


def _words(front: Front) -> dict[str, str]:
    """What stands in the shipped files, and what takes its place."""
    words = {_LISTEN: _shown(front.program, front.listen)}
    if front.tls:
        words[_CERTIFICATE] = _readable(front.tls.certificate)
        words[_KEY] = _readable(front.tls.key or front.tls.certificate)
        words[":8000"] = f":{front.listen.rpartition(':')[2]}"
        if front.tls.key and front.program == "haproxy":
            raise SettingsError("HAProxy takes one file with the certificate, its chain and the key: leave out --key")
        if front.tls.redirect:
            words[_REDIRECT] = _shown(front.program, front.tls.redirect)
    return words


def _replaced(line: str, words: dict[str, str]) -> str:
    """Replace all words at once, so that nothing is replaced in what has just been put there."""
    return re.sub("|".join(map(re.escape, words)), lambda word: words[word[0]], line)


def _shown(program: Program, address: str) -> str:
    """An address as the program takes it. HAProxy knows no brackets: the port is what follows the last colon."""
    return address.translate({ord("["): None, ord("]"): None}) if program == "haproxy" else address


def _readable(file: Path) -> str:
    path = str(file.resolve())
    if not os.access(path, os.R_OK):
        raise SettingsError(f"{file} cannot be read")
    if _FILE.fullmatch(path) is None:
        raise SettingsError(f"{path!r} cannot be named in a configuration: only letters, digits and ._/@+-")
    return path


def become(front: Front, folder: Path) -> NoReturn:
    """Turn this process into the balancer, in the foreground: its process id and its signals are the program's own.

    Args:
        front: What it is to be.
        folder: Where its configuration and its temporary files are kept; made when there is none.

    Raises:
        ImstreamError: It is not installed.
        SettingsError: As `configuration` does.
    """
    program = front.program
    path = find(program)
    if path is None:
        raise ImstreamError(f"{program} is not installed (Debian, Ubuntu: sudo apt install {program})")
    os.umask(UMASK)
    config = folder.resolve() / _CONFIGURATIONS[program]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        close_to_others(folder, _CONTENTS)
        if program == "haproxy" and front.tls and front.tls.key:
            front = replace(front, tls=replace(front.tls, certificate=_joined(front.tls, folder), key=None))
        config.write_text(configuration(front), "utf-8")
    except OSError as error:
        raise SettingsError(f"--folder={folder} cannot be used: {error.strerror}: {error.filename}") from None
    arguments = {
        "haproxy": ["-db", "-f", str(config)],
        "nginx": ["-e", "stderr", "-p", str(config.parent), "-c", str(config)],
    }[program]
    os.execv(path, [program, *arguments])  # noqa: S606 - that is its purpose


def _joined(tls: Tls, folder: Path) -> Path:
    """Certificate and key in one file, which nobody else can read."""
    both = folder.resolve() / _JOINED
    both.unlink(missing_ok=True)
    parts = [Path(_readable(file)).read_bytes() for file in (tls.certificate, tls.key) if file]
    with os.fdopen(os.open(both, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(b"\n".join(parts))
    return both
