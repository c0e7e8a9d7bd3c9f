"""Certificates of a cluster's own authority, made on the spot."""

from __future__ import annotations

import datetime
import socket
import ssl
from pathlib import Path

import trustme

from shardray.parallel.tls import NAME, TlsFiles


def make_tls(folder: Path, name: str = NAME, expired: bool = False) -> TlsFiles:
    """A new authority, and a certificate of its for ``name``, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    ended = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1) if expired else None
    issued = authority.issue_cert(name, not_after=ended)
    files = TlsFiles(str(folder / "ca.pem"), str(folder / "cert.pem"), str(folder / "key.pem"))
    authority.cert_pem.write_to_path(files.ca)
    Path(files.cert).write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(files.key)
    return files


def signed_by(files: TlsFiles, other: TlsFiles) -> TlsFiles:
    """Trusts the authority of ``files``, and shows the certificate of ``other``."""
    return TlsFiles(files.ca, other.cert, other.key)


def lets_in(port: int, ca: str, shown: TlsFiles | None) -> bool:
    """Whether a TLS client that shows ``shown``, or no certificate, is still connected half a second after that."""
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    if shown is not None:
        context.load_cert_chain(shown.cert, shown.key)
    with socket.create_connection(("127.0.0.1", port), timeout=0.5) as sock:
        try:
            with context.wrap_socket(sock, server_hostname=NAME) as secured:
                return secured.recv(1) != b""
        except TimeoutError:
            return True
        except OSError:
            return False
