"""What Redis' refusals mean to whoever asked."""

from __future__ import annotations

import re

from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)

from imstream.errors import StoreDenied, StoreFull, StoreRefused, StoreUnavailable

_PASSING = (ClusterDownError, TryAgainError)
_PASSING_CODES = ("MISCONF", "BUSY ")
"""Refusals that end by themselves, or when an operator has seen to Redis: as good as not being there."""

_DEMOTED = (ReadOnlyError, MasterDownError)
_DEMOTED_CODES = ("READONLY", "NOREPLICAS", "UNBLOCKED force")
"""The same, by a server that is no longer the master, or a master that its replicas cannot reach."""

_LOGIN = "look at the user and the password in IMSTREAM_REDIS_URL"
_PERMISSION = "give the user what ops/redis-users.acl lists (ACL LOG tells what was denied)"
_DENIED_IN_SCRIPT = ("The user executing the script can't ", "ACL failure in script: ")
"""What Redis and Valkey say somewhere in the sentence about a script; its code is not always NOPERM."""

_IN_SCRIPT = re.compile(r"Error running script .*?: -(?P<refusal>[A-Z]+ .*)", re.DOTALL)
"""Redis 6.2 puts what it refuses to a script into a sentence of its own."""


class Demoted(StoreUnavailable):
    """The server may not be the master any more: the connection is given up, and the next one goes where it is now."""


class Redirected(StoreRefused):
    """A node of a Redis Cluster names another one for this key. The command was not carried out.

    Attributes:
        error: As redis-py has read it.
    """

    def __init__(self, error: MovedError | AskError) -> None:
        super().__init__(f"{error}: this is a Redis Cluster, and its address begins with redis+cluster://")
        self.error = error


def error_from_reply(refused: ResponseError) -> Exception:
    """The exception for the caller, by what Redis refuses."""
    text = str(refused)
    if in_script := _IN_SCRIPT.match(text):
        text = in_script["refusal"]
    if isinstance(refused, NoPermissionError) or any(words in text for words in _DENIED_IN_SCRIPT):
        return StoreDenied(f"{text.rstrip('.')}: {_PERMISSION}")
    if isinstance(refused, OutOfMemoryError) or text.startswith("OOM "):
        return StoreFull(text)
    if isinstance(refused, _DEMOTED) or text.startswith(_DEMOTED_CODES):
        return Demoted(text)
    if isinstance(refused, _PASSING) or text.startswith(_PASSING_CODES):
        return StoreUnavailable(text)
    if isinstance(refused, MovedError | AskError):
        return Redirected(refused)
    return refused if isinstance(refused, NoScriptError) else StoreRefused(text)


def error_from_loss(error: BaseException) -> StoreUnavailable:
    """The exception for the caller when there is no connection, or none any more, by what went wrong."""
    text = describe(error)
    cause: BaseException | None = error
    while cause is not None:
        # What the Sentinels have said stands in a sentence, as redis-py shows exceptions.
        if isinstance(cause, AuthenticationError) or AuthenticationError.__name__ in str(cause):
            return StoreDenied(f"{text.rstrip('.')}: {_LOGIN}")
        if isinstance(cause, NoPermissionError):
            # A Redis Cluster that does not say who has which slot is taken for none.
            return StoreDenied(f"{describe(cause).rstrip('.')}: {_PERMISSION}")
        cause = cause.__cause__ or cause.__context__
    return StoreUnavailable(text)


def describe(error: BaseException) -> str:
    """One line for an operator; asyncio's TimeoutError has no text of its own."""
    return str(error) or "no answer in time"
