"""Who may ask, and how often: API keys, rates, and protection of a service on the user's own machine from web pages.

- Keys are compared as digests, in constant time, with all keys of the settings.
- A service without keys listens on this machine only, but any web page that its user visits could send it requests: by
  a form (so requests from another origin are refused), or after pointing a name of its own at 127.0.0.1 (so only the
  names of this machine are accepted as `Host`).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections import OrderedDict
from typing import Literal
from urllib.parse import urlsplit

from pydantic import SecretStr
from starlette.datastructures import Headers

from delf_milvus.errors import UsageError
from delf_milvus.service.problems import RefusedError
from delf_milvus.settings import ServiceSettings

Role = Literal["read", "write"]

_SHORTEST_KEY = 16
_CLIENTS = 10_000


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Keys:
    """The keys of the settings. Raises UsageError for a short key."""

    def __init__(self, settings: ServiceSettings) -> None:
        write = _digests("write_keys", settings.write_keys)
        read = _digests("read_keys", settings.read_keys)
        self._roles: list[tuple[bytes, Role]] = [(key, "read") for key in read] + [(key, "write") for key in write]

    def __bool__(self) -> bool:
        return bool(self._roles)

    def role(self, given: str) -> Role | None:
        """What a key allows, None where it is unknown; a key in both lists may write."""
        digest = _digest(given)
        found: Role | None = None
        for key, role in self._roles:
            if hmac.compare_digest(digest, key):
                found = role
        return found


def bearer(headers: Headers) -> str:
    """The key of a request, "" without one."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def client_of_key(key: str) -> str:
    """A name for the owner of a key that does not tell the key."""
    return f"key:{_digest(key).hex()[:12]}"


def check_listening(settings: ServiceSettings) -> None:
    """Raise UsageError for an address beyond this machine without keys."""
    if not (is_loopback(settings.host) or Keys(settings) or settings.insecure):
        raise UsageError(
            f"Listening on {settings.host} lets everybody who reaches it search and write: set "
            "DELF_MILVUS_SERVICE__READ_KEYS and DELF_MILVUS_SERVICE__WRITE_KEYS, or say --insecure."
        )


def check_same_site(headers: Headers, names: frozenset[str] | None, *, linked: bool = False) -> None:
    """Refuse what a page of another site sends. names: the only accepted names of this host; None: any. linked: it may
    be linked to."""
    host = headers.get("host", "")
    if names is not None and _name(host) not in names:
        raise RefusedError(
            403, "host_not_allowed", "This service without keys answers to the names of its own machine only."
        )
    if linked:
        return
    origin = headers.get("origin")
    foreign = origin is not None and urlsplit(origin).netloc != host
    if foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        raise RefusedError(403, "foreign_origin", "Requests of pages from another site are refused.")


class RateLimit:
    """A bucket for each client, which a minute fills with `per_minute` requests; of the clients seen last only."""

    def __init__(self, per_minute: int) -> None:
        self._most = float(per_minute)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> None:
        """Count one request; raises RefusedError where the bucket is empty."""
        if not self._most:
            return
        now = time.monotonic()
        left, since = self._buckets.pop(client, (self._most, now))
        left = min(self._most, left + (now - since) * self._most / 60)
        self._buckets[client] = (left - 1 if left >= 1 else left, now)
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)
        if left < 1:
            wait = (1 - left) * 60 / self._most
            raise RefusedError(429, "rate_limited", "Too many requests in a minute; wait as Retry-After says.", wait)


def _digests(name: str, keys: SecretStr) -> list[bytes]:
    found = [key.strip() for key in keys.get_secret_value().split(",") if key.strip()]
    if any(len(key) < _SHORTEST_KEY for key in found):
        raise UsageError(
            f"A key of service.{name} has less than {_SHORTEST_KEY} characters: make one with `openssl rand -hex 24`."
        )
    return [_digest(key) for key in found]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _name(host: str) -> str:
    """A `Host` without its port, in lower case."""
    name = host.lower()
    return name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]
