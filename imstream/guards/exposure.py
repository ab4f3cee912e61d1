"""A node that asks nobody who they are listens to its own machine only, unless it is told to trust its network."""

from __future__ import annotations

from typing import ClassVar, Self
from urllib.parse import urlsplit

import structlog

from imstream.errors import SettingsError
from imstream.guards.authentication import keys_given
from imstream.guards.guard import Guard, GuardDeps, Handshake, Reject
from imstream.settings import Settings
from imstream.texts import Sentence
from imstream.urls import is_loopback
from imstream.wire import Code

_FROM_ELSEWHERE = Reject(
    "from_elsewhere",
    Code.FORBIDDEN,
    Sentence(
        "本节点不验证用户身份,只接受来自本机的连接 (IMSTREAM_AUTH, IMSTREAM_ALLOW_INSECURE)",
        "This node asks nobody who they are, so it takes connections from its own machine only "
        "(IMSTREAM_AUTH, IMSTREAM_ALLOW_INSECURE)",
    ),
)

log = structlog.get_logger()


class Exposure(Guard):
    """Keeps a node without identity to its own machine, also behind a balancer that listens beyond it."""

    order: ClassVar[int] = 0

    def __init__(self, *, insecure: bool) -> None:
        self._insecure = insecure

    @classmethod
    def make(cls, supplies: GuardDeps) -> Self | None:
        """See `Guard`."""
        check_exposure(supplies.settings)
        return cls(insecure=supplies.settings.allow_insecure) if supplies.settings.auth == "none" else None

    async def __aenter__(self) -> Self:
        """Say what nobody should find out later."""
        if self._insecure:
            log.error("INSECURE: anybody who can reach this node may claim to be anybody (IMSTREAM_ALLOW_INSECURE)")
        else:
            log.warning("identity is not checked: anybody on this machine may claim to be anybody (IMSTREAM_AUTH=none)")
        return self

    def handshake(self, handshake: Handshake) -> Reject | None:
        """Refuse who comes through a balancer from elsewhere, and pages whose name was made to lead to this machine.

        The latter is DNS rebinding: such a page has the origin of our own, but not its name.
        """
        return None if self._insecure or is_from_here(handshake) else _FROM_ELSEWHERE


def check_exposure(settings: Settings) -> None:
    """See that a node without identity is not reached from other machines.

    Raises:
        SettingsError: It would be; or there is a key, so that identity was meant to be checked.
    """
    if settings.auth != "none":
        return
    auth, host = Settings.variable("auth"), Settings.variable("host")
    if given := keys_given(settings):
        raise SettingsError(
            f"{auth}=none is not allowed with {', '.join(map(Settings.variable, given))}: set {auth}=jwt, or no key"
        )
    if not (settings.allow_insecure or is_loopback(settings.host)):
        raise SettingsError(
            f"{host}={settings.host} is not allowed with {auth}=none, because anybody could claim to be anybody: "
            f"set {auth}=jwt and a key, or {host}=127.0.0.1, "
            f"or {Settings.variable('allow_insecure')}=true in a network where everybody is trusted"
        )


def is_from_here(handshake: Handshake) -> bool:
    """Whether a handshake names this machine, and was not forwarded from another one."""
    headers = handshake.headers
    came_by = [address.strip() for address in headers.get("x-forwarded-for", "127.0.0.1").split(",")]
    try:
        named = urlsplit(f"//{headers.get('host', 'localhost')}").hostname or ""
    except ValueError:
        return False
    return is_loopback(named) and all(map(is_loopback, came_by))
