"""TLS at the public port: the server's certificate, and the authority that clients' certificates have to be signed by.

gRPC asks for certificates anew with each connection that comes in, so a renewed one is shown to whoever connects from
then on, and connections that are open go on.
"""

from __future__ import annotations

import ssl
from typing import Any

import grpc

from shardray.parallel.tls import reason_of
from shardray.runtime.config import GrpcTlsSettings
from shardray.runtime.server.secret_files import SecretFiles, SecretsError, read_file


class ServerTls(SecretFiles):
    """Call ``start`` before anything else."""

    def __init__(self, settings: GrpcTlsSettings) -> None:
        paths = [settings.cert, settings.key]
        super().__init__(*paths, *([settings.client_ca] if settings.client_ca else []))
        self._settings = settings
        self._current: grpc.ServerCertificateConfiguration | None = None
        self._is_new = False

    def load(self) -> None:
        settings = self._settings
        cert = read_file("grpc.tls.cert", settings.cert)
        key = read_file("grpc.tls.key", settings.key, is_secret=True)
        client_ca = settings.client_ca and read_file("grpc.tls.client_ca", settings.client_ca)
        _check(settings)
        self._current = grpc.ssl_server_certificate_configuration([(key, cert)], client_ca or None)
        self._is_new = True

    def credentials(self) -> grpc.ServerCredentials:
        """For ``add_secure_port``; they follow the files."""
        assert self._current is not None
        asks_clients = self._settings.client_ca is not None
        self._is_new = False
        take_new: Any = self._take_new  # the stubs of grpc do not know that it may give None
        return grpc.dynamic_ssl_server_credentials(self._current, take_new, asks_clients)

    def _take_new(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC, in a thread of its own, for each connection; None keeps what it has."""
        is_new, self._is_new = self._is_new, False
        return self._current if is_new else None


def _check(settings: GrpcTlsSettings) -> None:
    """gRPC itself would refuse every connection, and say why to nobody. Raises SecretsError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.cert, settings.key, password=lambda: b"")
    except ssl.SSLError as error:
        fix = f"it has to be a certificate in PEM form, and {settings.key} its private key, not encrypted"
        raise SecretsError(f"grpc.tls.cert: {settings.cert}: {reason_of(error)}; {fix}") from None
    except OSError as error:
        raise SecretsError(f"grpc.tls.cert: {settings.cert} cannot be read: {error.strerror}") from None
    if settings.client_ca is not None:
        try:
            context.load_verify_locations(settings.client_ca)
        except OSError as error:
            fix = "it has to be a certificate in PEM form"
            raise SecretsError(f"grpc.tls.client_ca: {settings.client_ca}: {reason_of(error)}; {fix}") from None
