"""Mutual TLS inside the cluster: every process shows a certificate of the cluster's own authority, for one fixed name.

Hosts come and go with their addresses, so certificates carry no address: the name ``shardray`` among a certificate's
DNS names is what both sides ask for. Files are read where they are needed; key material never travels.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass

NAME = "shardray"
_CODES = re.compile(r"^\[[^]]*\] | ?\(_ssl\.c:\d+\)$")
_CERT_BEGIN = b"-----BEGIN CERTIFICATE-----"


class TlsError(ValueError):
    """Certificates that cannot be used; the message names the key of the settings and the file."""


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files, the same on every machine."""

    ca: str  # the authority that signed every certificate of the cluster
    cert: str  # this process's certificate, with what lies between it and the authority
    key: str  # its private key, not encrypted

    def read(self) -> tuple[bytes, bytes, bytes]:
        """The contents of ca, cert and key. Raises TlsError."""
        return self._read("ca"), self._read("cert"), self._read("key")

    def check(self) -> None:
        """Raise TlsError unless a process with these files would be let in by another one with the same files."""
        server, client = self.server_context(), self.client_context()
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        sides = (
            server.wrap_bio(to_server, to_client, server_side=True),
            client.wrap_bio(to_client, to_server, server_hostname=NAME),
        )
        try:
            for side in (sides[1], sides[0], sides[1], sides[0]):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
            check_name(sides[0])
        except ssl.SSLError as error:
            hint = f"it has to be signed by cluster.tls.ca {self.ca} for the name {NAME}, as server and as client"
            raise TlsError(f"cluster.tls.cert: {self.cert}: {reason_of(error)}; {hint}") from None

    def server_context(self) -> ssl.SSLContext:
        """For connections that are accepted: the other side has to show a certificate. Raises TlsError."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # no session is resumed, and nothing lies unread on a connection that is watched
        return context

    def client_context(self) -> ssl.SSLContext:
        """For connections that are made: the other side has to have the fixed name. Raises TlsError."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: ssl._SSLMethod) -> ssl.SSLContext:
        self.read()  # its errors say which file it is; those of ssl do not
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(self.ca)
        except ssl.SSLError as error:
            raise TlsError(f"cluster.tls.ca: {self.ca}: {reason_of(error)}") from None
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_password)
        except ssl.SSLError as error:
            hint = f"it has to be the private key, not encrypted, of cluster.tls.cert {self.cert}"
            raise TlsError(f"cluster.tls.key: {self.key}: {reason_of(error)}; {hint}") from None
        return context

    def _read(self, field: str) -> bytes:
        path = getattr(self, field)
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise TlsError(f"cluster.tls.{field}: {path} cannot be read: {error.strerror}") from None
        if field != "key" and _CERT_BEGIN not in content:
            raise TlsError(f"cluster.tls.{field}: {path} holds no certificate in PEM form")
        if field == "key" and b"PRIVATE KEY-----" not in content:
            raise TlsError(f"cluster.tls.{field}: {path} holds no private key in PEM form")
        return content


def check_name(tls: ssl.SSLObject) -> None:
    """Refuse a peer whose certificate is not for the fixed name. Raises SSLError."""
    names = (tls.getpeercert() or {}).get("subjectAltName", ())
    if ("DNS", NAME) not in names:
        raise ssl.SSLCertVerificationError(1, f"certificate is not valid for the name {NAME}")


def reason_of(error: OSError) -> str:
    """What went wrong with TLS or its files, without OpenSSL's codes and source lines."""
    told = getattr(error, "verify_message", None) or getattr(error, "reason", None) or error.strerror
    return _CODES.sub("", str(told or error)).replace("_", " ").lower()


def _no_password() -> bytes:
    """In place of asking at the terminal."""
    return b""
