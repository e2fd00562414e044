"""Every error that a user can meet: one class a situation, one sentence each, one exit code a class."""

from __future__ import annotations


def one_line(text: object) -> str:
    """The text with control characters, line breaks and invalid bytes escaped: for a message of one line, and so that
    a file name cannot steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


class DelfMilvusError(Exception):
    """Base of all errors of this package.

    Its text is one sentence, in one line, that says what is wrong and what to do; `exit_code` is what the command line
    ends with.
    """

    exit_code = 1

    def __str__(self) -> str:
        # Names and libraries' messages in it may be of strangers.
        return one_line(super().__str__())


class UsageError(DelfMilvusError):
    """An option, a setting or an argument has a value that makes no sense."""

    exit_code = 2


class DatabaseError(DelfMilvusError):
    """The database cannot be reached, is locked by another process, or failed while answering."""

    exit_code = 3


class ClusterError(DelfMilvusError):
    """A Ray cluster cannot be reached or started, or failed at work."""

    exit_code = 3


class CollectionError(DelfMilvusError):
    """A collection was made by another model, another schema or other software."""

    exit_code = 4


class ModelError(DelfMilvusError):
    """A weight file is missing, damaged or does not fit its specification."""

    exit_code = 4


class InputError(DelfMilvusError):
    """A photo, a folder or a metadata file cannot be read."""

    exit_code = 5


class ImageError(InputError):
    """The bytes are not a photo that can be decoded within the limits."""


class ImageFormatError(ImageError):
    """The bytes are of no format of photos that is read."""


class ImageTooLargeError(ImageError):
    """A photo has more bytes or pixels than the limits allow."""


class NotFoundError(InputError):
    """No image with that id is in the collection."""


class ServiceError(DelfMilvusError):
    """A service (`delf-milvus serve`) refused or failed a request.

    status: of HTTP, 0 where nothing answered. kind: the service's name of the situation. retry_after: seconds after
    which it asks to be asked again, or None.
    """

    exit_code = 3

    def __init__(self, message: str, status: int = 0, kind: str = "unreachable", retry_after: float | None = None):
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.retry_after = retry_after
