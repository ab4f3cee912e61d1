"""Who a client speaks for, and the token that shows it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from imstream.client.errors import ClientError
from imstream.texts import Lang
from imstream.wire import UserId

Token = str | Callable[[], str | Awaitable[str]]
"""A token, or what gives a fresh one whenever it is called."""


class NoToken(ClientError):  # noqa: N818 - reads as the state that it names
    """The function that should give a token has raised an error."""


@dataclass(slots=True)
class Credentials:
    """Who is speaking, how they show it, and in which language the server shall answer.

    A token that a server has refused is not shown again. A fresh one is, once: a server that refuses two in a row
    wants this user no more.
    """

    user_id: UserId
    token: Token | None = field(repr=False)
    lang: Lang
    _shown: str | None = field(default=None, init=False, repr=False)
    _believed: str | None = field(default=None, init=False, repr=False)
    _refused: str | None = field(default=None, init=False, repr=False)

    @property
    def is_fresh(self) -> bool:
        """Whether the next token is a new one."""
        return callable(self.token)

    @property
    def is_refused(self) -> bool:
        """Whether the token that was shown last is the one that the server has refused."""
        return self._refused is not None and self._shown == self._refused

    async def show(self) -> str | None:
        """The token for the next login.

        Raises:
            NoToken: The function that should give it did not.
        """
        token = self.token
        if callable(token):
            try:
                given = token()
                token = await given if inspect.isawaitable(given) else given
            except Exception as error:
                raise NoToken(f"there is no token: {type(error).__name__}") from error
        self._shown = token
        return token

    def believed(self) -> None:
        """The server has let us in."""
        self._refused, self._believed = None, self._shown

    def refused(self, *, was_in: bool) -> bool:
        """The server has not, or no longer if we were in; whether to come back with a fresh token.

        When a login ends, a token that is newer than the one it began with may have been said too late to be looked at.
        """
        first, self._refused = self._refused is None, self._believed if was_in else self._shown
        return self.is_fresh and first
