"""Real keys of every kind, tokens signed with them, and an issuer that publishes keys over HTTP."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from imstream.guards.auth.tokens import Algorithm
from tests.support.processes import free_port
from tests.support.users import user_id

USER = user_id(10001)
SECRET = "a secret of at least thirty-two bytes"  # noqa: S105 - of these tests
PUBLIC: tuple[Algorithm, ...] = ("RS256", "ES256", "EdDSA")


@cache
def key_of(algorithm: str, number: int = 0) -> Any:  # noqa: ANN401 - each algorithm has its own type of key
    """A cached private key of this algorithm. `number` distinguishes several."""
    del number
    match algorithm:
        case "RS256":
            return rsa.generate_private_key(65537, 2048)
        case "RS256-weak":
            return rsa.generate_private_key(65537, 1024)  # noqa: S505 - must be refused
        case "ES256":
            return ec.generate_private_key(ec.SECP256R1())
        case "ES384":
            return ec.generate_private_key(ec.SECP384R1())
        case "EdDSA":
            return ed25519.Ed25519PrivateKey.generate()
        case "EdDSA-448":
            return ed448.Ed448PrivateKey.generate()
    raise AssertionError(algorithm)


def private_pem(key: Any) -> bytes:  # noqa: ANN401 - see `key_of`
    """The private key as PEM."""
    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem


def public_pem(key: Any) -> bytes:  # noqa: ANN401 - see `key_of`
    """The public key as PEM."""
    pem: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem


def written(folder: Path, content: bytes, name: str = "key.pem") -> Path:
    """A file with this content."""
    path = folder / name
    path.write_bytes(content)
    return path


def token(
    key: Any = SECRET,  # noqa: ANN401 - see `key_of`
    algorithm: str = "HS256",
    *,
    headers: dict[str, Any] | None = None,
    **claims: Any,  # noqa: ANN401 - valid and invalid claims
) -> str:
    """A token of `USER` that is valid for an hour; claims that are None are omitted."""
    all_claims = {"sub": str(USER), "exp": int(time.time()) + 3600, **claims}
    return jwt.PyJWS().encode(
        json.dumps({name: value for name, value in all_claims.items() if value is not None}).encode(),
        key,
        algorithm,
        headers,
    )


def as_jwk(key: Any, algorithm: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - see `key_of`
    """The public key as JWK."""
    found: dict[str, Any] = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)
    found.pop("key_ops", None)
    return {**found, **fields}


@dataclass
class Issuer:
    """Publishes keys while it listens.

    Attributes:
        keys: The published document; a string is sent as it is.
        packed: Whether it sends gzip unconditionally.
        fetched: Number of requests.
    """

    port: int = field(default_factory=free_port)
    keys: list[dict[str, Any]] | str = field(default_factory=list)
    status: int = 200
    packed: bool = False
    fetched: int = 0
    _runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """The URL of its key set."""
        return f"http://127.0.0.1:{self.port}/keys.json"

    async def come(self) -> None:
        """Start listening."""
        app = web.Application()
        app.router.add_get("/keys.json", self._answer)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def go(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, _: web.Request) -> web.Response:
        self.fetched += 1
        text = self.keys if isinstance(self.keys, str) else json.dumps({"keys": self.keys})
        response = web.Response(body=text.encode(), status=self.status, headers={"Location": self.url})
        if self.packed:
            response.enable_compression(web.ContentCoding.gzip)
        return response


@asynccontextmanager
async def issuer(*keys: dict[str, Any], away: bool = False) -> AsyncIterator[Issuer]:
    """Run an issuer on a free port."""
    one = Issuer(keys=list(keys))
    if not away:
        await one.come()
    try:
        yield one
    finally:
        await one.go()
