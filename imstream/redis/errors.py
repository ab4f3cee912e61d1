"""Errors from Redis: their meaning for the caller, the log of denied access, and retrying until Redis is available."""

import re
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
from redis import exceptions
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from imstream.errors import StoreDenied, StoreFull, StoreRefused, StoreUnavailable

_UNAVAILABLE = (exceptions.ClusterDownError, exceptions.TryAgainError)
_DISK_CODE = "MISCONF"
_UNAVAILABLE_CODES = (_DISK_CODE, "BUSY ")
"""Errors that end without a change of ours, or once an operator has acted: Redis counts as unavailable."""

_DEMOTED = (exceptions.ReadOnlyError, exceptions.MasterDownError)
_DEMOTED_CODES = ("READONLY", "NOREPLICAS", "UNBLOCKED force")
"""Errors of a former master, or of a master that cannot reach its replicas."""

_LOGIN_HINT = "check the user and the password in IMSTREAM_REDIS_URL"
_PERMISSION_HINT = "grant the user the permissions in ops/redis-users.acl (ACL LOG shows denied commands)"
_DENIED_IN_SCRIPT = ("The user executing the script can't ", "ACL failure in script: ")
"""How Redis and Valkey report a permission missing inside a script; the code is not always NOPERM."""

_IN_SCRIPT = re.compile(r"Error running script .*?: -(?P<error>[A-Z]+ .*)", re.DOTALL)
"""Redis 6.2 wraps an error inside a script in a sentence of its own."""

_ERROR_CODE = re.compile(r"[A-Z]{4,}(?= )")  # how an error reply begins, such as NOREPLICAS
LOG_AGAIN_AFTER = 300.0  # seconds after which the same denial is logged again

_MAX_DENIALS = 100
"""Maximum number of texts remembered. When it is reached they are forgotten, and may be logged again early."""

_RETRIED = (StoreUnavailable, StoreFull)
_RETRY_WAIT = wait_random_exponential(multiplier=0.1, max=1)
"""Short: a node promises to be ready again 2 s after Redis is."""

Reply = TypeVar("Reply")

log = structlog.get_logger()


class Demoted(StoreUnavailable):
    """The server may be a former master: the connection is closed, and the next one finds the current master."""


class Redirected(StoreRefused):
    """A node of a Redis Cluster names another node for this key. The command was not executed."""

    def __init__(self, error: exceptions.MovedError | exceptions.AskError) -> None:
        super().__init__(f"{error}: this is a Redis Cluster, and its address begins with redis+cluster://")
        self.error = error


def error_from_reply(error: exceptions.ResponseError) -> Exception:
    """The exception for the caller when Redis answers a command with an error."""
    text = str(error)
    if in_script := _IN_SCRIPT.match(text):
        text = in_script["error"]
    if isinstance(error, exceptions.NoPermissionError) or any(words in text for words in _DENIED_IN_SCRIPT):
        return StoreDenied(f"{text.rstrip('.')}: {_PERMISSION_HINT}")
    if isinstance(error, exceptions.OutOfMemoryError) or text.startswith("OOM "):
        return StoreFull(text)
    if isinstance(error, _DEMOTED) or text.startswith(_DEMOTED_CODES):
        return Demoted(text)
    if isinstance(error, _UNAVAILABLE) or text.startswith(_UNAVAILABLE_CODES):
        return StoreUnavailable(text)
    if isinstance(error, exceptions.MovedError | exceptions.AskError):
        return Redirected(error)
    return error if isinstance(error, exceptions.NoScriptError) else StoreRefused(text)


def error_from_loss(error: BaseException) -> StoreUnavailable:
    """The exception for the caller when a connection fails or cannot be made."""
    text = describe(error)
    cause: BaseException | None = error
    while cause is not None:
        # redis-py reports the replies of Sentinels as text, with the names of exceptions in it.
        if isinstance(cause, exceptions.AuthenticationError) or exceptions.AuthenticationError.__name__ in str(cause):
            return StoreDenied(f"{text.rstrip('.')}: {_LOGIN_HINT}")
        if isinstance(cause, exceptions.NoPermissionError):
            return StoreDenied(f"{describe(cause).rstrip('.')}: {_PERMISSION_HINT}")
        cause = cause.__cause__ or cause.__context__
    return StoreUnavailable(text)


def describe(error: BaseException) -> str:
    """One line for an operator; asyncio's TimeoutError has no text of its own."""
    return str(error) or "no answer in time"


def describe_problem(error: Exception | None) -> str:
    """Why Redis is not usable, in a few words without addresses. None: it has not answered."""
    if isinstance(error, StoreDenied):
        return "redis denies access, see the log"
    code = _ERROR_CODE.match(str(error))
    return f"redis answers {code[0]}, see the log" if code else "redis does not answer"


class AccessLog:
    """Logs denied access once per `LOG_AGAIN_AFTER`. Shared by all connections of a process, which all retry."""

    def __init__(self, on_refusal: Callable[[str], None] = lambda _: None) -> None:
        """`on_refusal` is called with the exhausted resource, `memory` or `disk`, for each command that it refuses."""
        self._on_refusal = on_refusal
        self._logged_at: dict[str, float] = {}

    def report(self, error: Exception) -> None:
        """Report an exhausted resource; log a denial, unless the same one was logged recently."""
        text, now = str(error), time.monotonic()
        if isinstance(error, StoreFull):
            self._on_refusal("memory")
        elif text.startswith(_DISK_CODE):
            self._on_refusal("disk")
        if not isinstance(error, StoreDenied):
            return
        if now - self._logged_at.get(text, float("-inf")) < LOG_AGAIN_AFTER:
            return
        if len(self._logged_at) >= _MAX_DENIALS:
            self._logged_at.clear()
        self._logged_at[text] = now
        log.error("redis denies access", error=text)


async def retry_until_available(call: Callable[[], Awaitable[Reply]]) -> Reply:
    """Repeat a call until Redis answers, with growing pauses. Cancel it to give up."""

    async def retried() -> Reply:
        return await call()  # tenacity awaits coroutine functions only, and `call` may be a lambda

    try:
        return await call()
    except _RETRIED:
        return await AsyncRetrying(retry=retry_if_exception_type(_RETRIED), wait=_RETRY_WAIT)(retried)
