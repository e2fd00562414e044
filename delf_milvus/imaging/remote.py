"""Photos behind addresses, `s3://bucket/photos`, `gs://`, `https://`: in whatever storage fsspec reads.

Access is told by the variables and files of each storage's own tools (AWS_ACCESS_KEY_ID and so on), never by an
address: addresses are stored and shown. Only the user gives them: what a listing or a stored record names is read where
it lies below one that was given.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

from delf_milvus.errors import ImageError, InputError, UsageError, one_line
from delf_milvus.imaging.decode import TOO_LARGE
from delf_milvus.settings import DecodeSettings

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_address(place: str) -> bool:
    """Whether this is an address and no path of this machine."""
    return _ADDRESS.match(place) is not None


def checked(address: str) -> str:
    """An address that a user gave, without slashes at its end.

    Raises UsageError for one with a secret in it, with a query or a fragment, or of several in a chain.
    """
    shown = one_line(re.sub(r"//[^/]*@", "//***@", address.partition("?")[0]))
    protocol, _, rest = address.partition("://")
    if "@" in rest.partition("/")[0] or "?" in rest:
        raise UsageError(
            f"{shown}: an address is stored and shown, so it may have no user, password or query in it: tell them by "
            "the variables of the storage's own tools, AWS_ACCESS_KEY_ID for s3:// and so on."
        )
    if "::" in address or "#" in rest or not rest.strip("/"):
        raise UsageError(f"{shown} is not an address of photos, as s3://bucket/folder is.")
    return f"{protocol.lower()}://{rest.rstrip('/')}"


def files(base: str) -> list[str]:
    """The addresses of all files below a checked address, at any depth, sorted; of a file, it alone.

    Raises InputError where there is nothing or it cannot be read, UsageError where nothing here reads such addresses.
    """
    storage, root = _storage(base)
    try:
        storage.invalidate_cache()
        found = storage.find(root)
    except Exception as error:
        raise _unreadable(base, error) from None
    if not found:
        raise InputError(f"{one_line(base)} does not exist, or nothing is in it; check the address.")
    root = root.rstrip("/")
    return sorted(base + path[len(root) :] for path in found)


def read(address: str, limits: DecodeSettings) -> bytes:
    """The bytes of a photo, still encoded: at least one, at most `limits.max_bytes`.

    Raises InputError where it cannot be read, ImageError for an empty file.
    """
    storage, path = _storage(address)
    try:
        if storage.info(path)["type"] != "file":
            raise InputError(f"{one_line(address)} is not a file.")
        with storage.open(path, "rb") as file:
            data: bytes = file.read(limits.max_bytes + 1)
    except InputError:
        raise
    except Exception as error:
        raise _unreadable(address, error) from None
    if len(data) > limits.max_bytes:
        raise InputError(f"{one_line(address)} has more bytes than the limit of {limits.max_bytes:,}; {TOO_LARGE}.")
    if not data:
        raise ImageError(f"{one_line(address)} is empty.")
    return data


def exists(address: str) -> bool:
    """Whether a file is there. Raises InputError where that cannot be told: no answer is no sign that it is gone."""
    try:
        storage, path = _storage(address)
        return bool(storage.info(path)["type"] == "file")
    except (FileNotFoundError, NotADirectoryError):
        return False
    except UsageError as error:
        raise InputError(str(error)) from None
    except Exception as error:
        raise _unreadable(address, error) from None


def below(base: str, address: str) -> str | None:
    """The path of an address below a checked base, or None if it lies elsewhere."""
    path = address.removeprefix(f"{base}/")
    return None if path == address or posixpath.normpath(path).startswith("../") else path


def _storage(address: str) -> tuple[Any, str]:
    """The file system of an address, and its path there."""
    import fsspec

    try:
        storage, path = fsspec.core.url_to_fs(address)
    except ImportError as error:
        hint = "pip install 'delf-milvus[s3]'" if address.startswith("s3:") else f"install {one_line(error.name)}"
        raise UsageError(f"{one_line(address)} needs a package that is not installed: {hint}.") from None
    except Exception as error:
        raise UsageError(f"{one_line(address)} cannot be read here: {_reason(error)}.") from None
    return storage, path


def _unreadable(address: str, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{one_line(address)} does not exist; check the address.")
    return InputError(f"{one_line(address)} cannot be read: {_reason(error)}.")


def _reason(error: Exception) -> str:
    """What a storage's library says, in one line; only of the kinds whose texts name no secret."""
    text = str(error).partition("\n")[0][:200].rstrip(". ") if isinstance(error, OSError | ValueError) else ""
    return one_line(text or type(error).__name__)
