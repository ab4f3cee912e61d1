"""Types of the options of a backend.

Headers and parameters are JSON objects that may contain secrets, and therefore `Secret` as a whole: neither errors nor
`repr` show them, and they have no command-line option.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, JsonValue, Secret
from pydantic_settings import NoDecode

from imstream.strict_json import InvalidJson, parse_json
from imstream.urls import SecretUrl

OWN_HEADERS = frozenset({"accept-encoding", "connection", "content-length", "content-type", "transfer-encoding"})
"""Headers that the client itself sets, in lower case."""

OWN_PARAMETERS = frozenset({"messages", "model", "n", "stream"})
"""Parameters of a chat completion that the client itself sets, or that would change the shape of the answer."""

_MAX_DEPTH, _MAX_VALUES = 16, 1000
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


def _parse_object(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        value = parse_json(value, max_depth=_MAX_DEPTH, max_values=_MAX_VALUES)
    except InvalidJson as error:
        raise ValueError(f"a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("a JSON object, in braces")  # noqa: TRY004 - pydantic expects ValueError
    return value


def _check_headers(headers: Secret[dict[str, str]]) -> Secret[dict[str, str]]:
    for name, value in headers.get_secret_value().items():
        if _HEADER_NAME.fullmatch(name) is None:
            raise ValueError(f"{name!a} is not the name of a header")
        if name.lower() in OWN_HEADERS:
            raise ValueError(f"the header {name} is set by imstream")
        if not fits_in_header(value):
            raise ValueError(f"the header {name} must be printable ASCII")
    return headers


def _check_body(body: Secret[dict[str, JsonValue]]) -> Secret[dict[str, JsonValue]]:
    if own := sorted(OWN_PARAMETERS & set(body.get_secret_value())):
        raise ValueError(f"the parameter {own[0]} is set by imstream")
    return body


Headers = Annotated[Secret[dict[str, str]], NoDecode, BeforeValidator(_parse_object), AfterValidator(_check_headers)]
Parameters = Annotated[
    Secret[dict[str, JsonValue]], NoDecode, BeforeValidator(_parse_object), AfterValidator(_check_body)
]


def _check_proxy(proxy: SecretUrl) -> SecretUrl:
    if not proxy.get_secret_value().startswith(("http://", "https://")) and proxy.get_secret_value() != "env":
        raise ValueError("the URL of an HTTP proxy, or env")
    return proxy


ProxyOption = Annotated[SecretUrl, AfterValidator(_check_proxy)]
UsageOption = Literal["auto", "yes", "no"]
MaxTokensOption = Literal["none", "max_tokens", "max_completion_tokens"]
RolesOption = Literal["merge", "as_is"]
SystemOption = Literal["role", "user"]
ReasoningOption = Literal["tags", "open_tags", "field", "none"]
ContinueOption = Literal["none", "assistant", "vllm", "prefix"]


def fits_in_header(value: str) -> bool:
    """Whether a text may be the value of a header."""
    return value.isascii() and value.isprintable()
