"""A certificate authority for tests, and its certificates as files for servers and clients."""

import ssl
from dataclasses import dataclass, field
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificate:
    """PEM files: the certificate with its chain, its private key, and both in one."""

    chain: Path
    key: Path
    both: Path


@dataclass(frozen=True)
class RedisTls:
    """TLS of Redis servers, which then accept TLS only.

    Attributes:
        authority: The authority that servers and clients trust.
        server: The servers' certificate.
        client: The clients' certificate; None if servers do not require one.
    """

    authority: Path
    server: Certificate
    client: Certificate | None = None

    def options(self, port: int) -> dict[str, str]:
        """Options of a server or a Sentinel, instead of its `port`."""
        return {
            "port": "0",
            "tls-port": str(port),
            "tls-cert-file": str(self.server.chain),
            "tls-key-file": str(self.server.key),
            "tls-ca-cert-file": str(self.authority),
            "tls-auth-clients": "yes" if self.client else "no",
            "tls-replication": "yes",
            "tls-cluster": "yes",
        }

    @property
    def query(self) -> dict[str, str]:
        """Options of a URL, which are also redis-py's."""
        own = {"ssl_certfile": str(self.client.chain), "ssl_keyfile": str(self.client.key)} if self.client else {}
        return {"ssl_ca_certs": str(self.authority), **own}


@dataclass
class Authority:
    """An authority that is trusted only where it is configured."""

    folder: Path
    _ca: trustme.CA = field(default_factory=trustme.CA)

    @property
    def file(self) -> Path:
        """Its own certificate."""
        path = self.folder / "ca.pem"
        if not path.exists():
            self._ca.cert_pem.write_to_path(str(path))
        return path

    def issue(self, *names: str) -> Certificate:
        """Issue a certificate for host names and addresses."""
        issued = self._ca.issue_cert(*names)
        base = self.folder / names[0]
        made = Certificate(*(base.with_name(f"{base.name}{ending}") for ending in (".pem", ".key", ".both.pem")))
        made.chain.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(made.key))
        issued.private_key_and_cert_chain_pem.write_to_path(str(made.both))
        return made

    def client(self) -> ssl.SSLContext:
        """A context of a client that trusts this authority only."""
        return ssl.create_default_context(cafile=str(self.file))
