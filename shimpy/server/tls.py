"""TLS by certificate files."""

from __future__ import annotations

import ssl
from pathlib import Path

from shimpy.errors import UserError


def make_tls(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """Return the context for a certificate (with its chain) and its key; None: there is none.

    Raises:
        UserError: only one of them is given, or they can't be used; says why.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise UserError("tls_cert and tls_key belong together: set both or neither")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(context, cert, key)
    return context


def load_certificate(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Use a certificate for all connections from now on; errors as `make_tls`."""
    try:
        # A key with a passphrase: asking for it on a terminal would hang the daemon.
        context.load_cert_chain(cert, key, password=_no_password)
    except OSError as error:
        # ssl.SSLError is one; so is a file that is not there.
        reason = error.strerror or str(error)
        raise UserError(f"can't use the certificate {cert} with the key {key}: {reason}") from error


def _no_password() -> str:
    raise UserError("the key in tls_key has a passphrase; use one without")
