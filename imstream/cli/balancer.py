"""`imstream balancer`: the nginx or HAProxy of this machine in front of some nodes.

The configurations are those of `ops/`, which are usable as they are; for other nodes only addresses are replaced.
"""

from __future__ import annotations

import os
import re
import shutil
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, get_args

from imstream.errors import ImstreamError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

Program = Literal["haproxy", "nginx"]

FOLDER = Path(".imstream/balancer")
"""Where the configuration and the temporary files of a running one are kept, unless another folder is named."""

_CONFIGURATIONS: dict[Program, str] = {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}
_LISTEN = "127.0.0.1:8000"
_FIRST_NODE = "127.0.0.1:8080"
_NODE_LINE = re.compile(r"\s*server 127\.0\.0\.1:\d+\b")
_ADDRESS = re.compile(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")
_PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin")
"""Where the programs are, besides PATH: that of an ordinary user of Debian lacks the first two."""


def find(program: Program) -> str | None:
    """The path of a program; None when it is not installed."""
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *_PLACES]))


def installed() -> Program | None:
    """The program to take when either will do: HAProxy before nginx, because its health checks are active."""
    return next((program for program in get_args(Program) if find(program)), None)


def configuration(program: Program, listen: str, nodes: Sequence[str]) -> str:
    """The configuration for these nodes. All addresses are `host:port`, with brackets around an IPv6 host.

    Raises:
        SettingsError: An address is none.
    """
    for address in (listen, *nodes):
        if _ADDRESS.fullmatch(address) is None:
            raise SettingsError(f"{address!r} is no address such as 10.0.0.1:8080 or [::1]:8080")
    if program == "haproxy":  # it knows no brackets: the port is what follows the last colon
        listen, *nodes = (address.translate({ord("["): None, ord("]"): None}) for address in (listen, *nodes))
    lines = []
    for line in (resources.files("imstream.cli") / _CONFIGURATIONS[program]).read_text("utf-8").splitlines():
        if not _NODE_LINE.match(line):
            lines.append(line.replace(_LISTEN, listen))
        elif _FIRST_NODE in line:
            lines += [line.replace(_FIRST_NODE, node) for node in nodes]
    return "\n".join([*lines, ""])


def become(program: Program, folder: Path, listen: str, nodes: Sequence[str]) -> NoReturn:
    """Turn this process into the balancer, in the foreground: its process id and its signals are the program's own.

    Args:
        program: Which one.
        folder: Where its configuration and its temporary files are kept; made when there is none.
        listen: The address it listens on.
        nodes: The addresses of the nodes.

    Raises:
        ImstreamError: It is not installed.
        SettingsError: An address is none.
    """
    path = find(program)
    if path is None:
        raise ImstreamError(f"{program} is not installed (Debian, Ubuntu: sudo apt install {program})")
    folder.mkdir(parents=True, exist_ok=True)
    config = folder.resolve() / _CONFIGURATIONS[program]
    config.write_text(configuration(program, listen, nodes), "utf-8")
    arguments = {
        "haproxy": ["-db", "-f", str(config)],
        "nginx": ["-e", "stderr", "-p", str(config.parent), "-c", str(config)],
    }[program]
    os.execv(path, [program, *arguments])  # noqa: S606 - that is its purpose
