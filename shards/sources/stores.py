"""Reads pictures from stores and servers that fsspec knows, such as s3://, gs:// and ftp://.

A failure concerns one picture, as in `download.py`. Only if a kind of store does not answer any more, after it did, the
pack ends.
"""

import errno
import ftplib
import threading
import time
from typing import Any

from shards.pictures.formats import BadPicture
from shards.sources.answers import Answers
from shards.sources.download import OWN_LIMITS, answers, shorten_url
from shards.storage import describe_error, is_bucket_missing, is_storage_error, parse_place, read_range
from uniemox_dist.core.errors import UserError

TRIES = 2
"""Tries of a request that fails by an error that may pass, in addition to those of the store's own library."""
PAUSE_S = 1.0
"""Pause before the second try."""
_AGAIN = frozenset({408, 425, 429})
"""HTTP statuses below 500 that may be another one soon."""
_FINAL = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
) | {errno.EINVAL, errno.ENOSYS, errno.EEXIST, getattr(errno, "EREMCHG", errno.EINVAL)}
"""Errors that repeating does not repair."""
_FINAL_NAMES = ("Credentials", "ProfileNotFound", "ParamValidation", "InvalidRegion", "NotSupported")
"""Parts of the names of such errors of libraries."""
_lock = threading.Lock()
_by_protocol: dict[str, Answers] = {"http": answers, "https": answers}


def answers_of(url: str) -> Answers:
    """The answers of all stores of a URL's kind."""
    protocol = url.partition("://")[0].lower()
    with _lock:
        return _by_protocol.setdefault(protocol, Answers(f"{protocol}:// server", "it or the network"))


def read_stored(url: str, offset: int = 0, length: int | None = None) -> bytes:
    """The bytes of a file of a store; `length` bytes from `offset`, or all of them.

    Raises:
        BadPicture: `unreadable` if the file is missing, the store refuses to send it, or does not answer.
        Fault: if no store of this kind has answered for the last pictures, although some did before.
        OSError: if this process has too many open files.
    """
    for number in range(1, TRIES + 1):
        try:
            place = parse_place(url)
            data = bytes(place.read_bytes()) if length is None else read_range(place, offset, length)
        except UserError as error:  # an unknown protocol, or its package is missing
            raise BadPicture("unreadable", str(error)) from None
        except Exception as error:  # fsspec's file systems raise the errors of their libraries
            if isinstance(error, OSError) and error.errno in OWN_LIMITS:
                raise
            if not _may_pass(error):
                if isinstance(error, FileNotFoundError | PermissionError):
                    answers_of(url).add(True)
                raise BadPicture("unreadable", f"{_describe(error)}: {shorten_url(url)}") from None
            if number == TRIES:
                answers_of(url).add(False)
                tried = f"(tried {TRIES} times)"
                raise BadPicture("unreadable", f"{_describe(error)} {tried}: {shorten_url(url)}") from None
            time.sleep(PAUSE_S)
        else:
            answers_of(url).add(True)
            return data
    raise AssertionError("unreachable: the last try returns or raises")


def _may_pass(error: Exception) -> bool:
    """Whether a store does not answer at the moment, such as errors of connections, time-outs and statuses of 5xx."""
    cause = error.__cause__
    if isinstance(error, ftplib.error_temp | EOFError) or isinstance(cause, ftplib.error_temp | EOFError):
        return True
    status = _status(error) or (_status(cause) if cause is not None else None)
    if status is not None:
        return status >= 500 or status in _AGAIN
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    if isinstance(error, OSError):
        return error.errno not in _FINAL
    return is_storage_error(error) and not any(name in type(error).__name__ for name in _FINAL_NAMES)


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of botocore, aiohttp, gcsfs or azure."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        names = ("status", "status_code", "code")
        found = next((value for name in names if (value := getattr(error, name, None)) is not None), None)
    return int(found) if isinstance(found, int) or (isinstance(found, str) and found.isdecimal()) else None


def _describe(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such bucket" if is_bucket_missing(error) else error.strerror or "no such file"
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return "not a file name"
    text = " ".join(describe_error(error).split())
    return text if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {text}"
