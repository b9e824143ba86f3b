"""Who may talk between machines, and how others are kept from listening.

The driver makes an authority for the run (`issue`): a key pair that signs one certificate for the
partitions and one for their clients, and is then forgotten. `Credentials` travel through Ray. Here
are also the contexts of the TLS handshake, the proofs that a peer has the run's key, and the keys
of the stream that follows. `handshake` uses these in turn.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import os
import ssl
from dataclasses import dataclass, field, replace

from downpour.paramserver.codec import encode
from downpour.paramserver.messages import Admission, Introduction

VALID_DAYS = 366
_PARTITION_NAME, _CLIENT_NAME = "partition.downpour", "client.downpour"
_NO_PROOF = bytes(32)


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What one side of the run's connections shows, and whom it believes. All of it is PEM."""

    certificate: bytes = field(repr=False)
    """Signed by `authority`, for the one role that it names."""
    private_key: bytes = field(repr=False)
    """Of `certificate`."""
    authority: bytes = field(repr=False)
    """The certificate of the run's authority."""


@dataclass(frozen=True, kw_only=True)
class RunCredentials:
    """Both roles' credentials. The authority's own key is kept by nobody."""

    partitions: Credentials
    clients: Credentials


@dataclass(frozen=True, kw_only=True)
class TrafficKeys:
    """The keys of one connection's two directions, AES-256 each."""

    to_partition: bytes = field(repr=False)
    to_client: bytes = field(repr=False)


def issue() -> RunCredentials:
    """Make an authority, and certificates of a year for partitions and for clients."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.UTC)
    begin = now - datetime.timedelta(days=1)  # clocks differ between machines
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "downpour run")])

    def begun(name: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(authority_name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + datetime.timedelta(days=VALID_DAYS))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )

    def usage(*, signs_certificates: bool) -> x509.KeyUsage:
        return x509.KeyUsage(
            digital_signature=not signs_certificates,
            key_cert_sign=signs_certificates,
            crl_sign=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )

    authority = (
        begun(authority_name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(signs_certificates=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    authority_pem = authority.public_bytes(serialization.Encoding.PEM)

    def role(name: str, purpose: x509.ObjectIdentifier) -> Credentials:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            begun(subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
                critical=False,
            )
            .sign(authority_key, hashes.SHA256())
        )
        return Credentials(
            certificate=certificate.public_bytes(serialization.Encoding.PEM),
            private_key=key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            authority=authority_pem,
        )

    return RunCredentials(
        partitions=role(_PARTITION_NAME, ExtendedKeyUsageOID.SERVER_AUTH),
        clients=role(_CLIENT_NAME, ExtendedKeyUsageOID.CLIENT_AUTH),
    )


def partition_tls(credentials: Credentials) -> ssl.SSLContext:
    """What a partition's handshakes go by: TLS 1.3, and a client's certificate of this run."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # no connection is resumed
    return _with(context, credentials)


def client_tls(credentials: Credentials) -> ssl.SSLContext:
    """What a client's handshakes go by: TLS 1.3, and a partition's certificate of this run."""
    return _with(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), credentials)


def wrap(
    context: ssl.SSLContext, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *, is_server: bool
) -> ssl.SSLObject:
    """A TLS connection over memory; a client expects a partition's name at the other end."""
    name = None if is_server else _PARTITION_NAME
    return context.wrap_bio(incoming, outgoing, server_side=is_server, server_hostname=name)


def _with(context: ssl.SSLContext, credentials: Credentials) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=credentials.authority.decode())
    # `ssl` reads a private key from files only: this one is memory, and goes at once.
    fd = os.memfd_create("downpour-credentials", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(credentials.private_key + credentials.certificate)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return context


def introduction_proof(key: bytes, challenge: bytes, introduction: Introduction) -> bytes:
    """What `introduction` has to bear as its proof, as an answer to the nonce `challenge`."""
    about = encode(replace(introduction, proof=_NO_PROOF))
    return _proof(key, b"downpour client", challenge, about)


def admission_proof(
    key: bytes, challenge: bytes, introduction: Introduction, admission: Admission
) -> bytes:
    """What `admission` has to bear as its proof, as an answer to `introduction`."""
    about = encode(introduction) + encode(replace(admission, proof=_NO_PROOF))
    return _proof(key, b"downpour partition", challenge, about)


def _proof(key: bytes, role: bytes, challenge: bytes, about: bytes) -> bytes:
    return hmac.digest(key, role + challenge + about, hashlib.sha256)


def traffic_keys(key: bytes, challenge: bytes, nonce: bytes) -> TrafficKeys:
    """Return the keys that follow from a handshake whose nonces went through TLS, so are secret."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    derive = HKDF(algorithm=hashes.SHA256(), length=64, salt=key, info=b"downpour traffic")
    both = derive.derive(challenge + nonce)
    return TrafficKeys(to_partition=both[:32], to_client=both[32:])
