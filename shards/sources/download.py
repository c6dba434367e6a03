"""Downloads pictures from web servers, with time-outs, retries and a limit of bytes.

Many servers of a list of URLs are slow, gone or answer with a page of HTML; each failure concerns one picture. Only if
no server answers any more, after some did, the pack ends, because the network is then probably down.
"""

import base64
import contextlib
import errno
import http.client
import queue
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn
from urllib.parse import quote, unquote, urljoin, urlsplit

from shards.pictures.formats import HEAD_BYTES, BadPicture, identify_format
from shards.sources.answers import Answers
from uniemox_dist.core.files import hide_secrets

SILENCE_S = 10.0
"""Longest wait for a connection, or for the next bytes."""
TOTAL_S = 60.0
"""Longest time of one try: look-up of the name, connection, TLS, redirects and all bytes."""
LARGEST_BYTES = 64 << 20
"""Largest picture."""
TRIES = 3
"""Tries if the server answers that it is busy; two if it does not answer."""
PAUSE_S = 1.0
"""Pause before the second try; doubles each time."""
LONGEST_PAUSE_S = 30.0
"""Longest pause that a server may ask for (Retry-After)."""
REDIRECTS = 5
_REDIRECTED = frozenset({301, 302, 303, 307, 308})
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may be another one soon."""
OWN_LIMITS = frozenset({errno.EMFILE, errno.ENFILE})
"""Errors of this process rather than of a server: too many open files."""
_CHUNK = 1 << 16


def is_web(path: str) -> bool:
    """Whether a path is a URL of a web server."""
    return path[:8].lower().startswith(("http://", "https://"))


def download(url: str) -> bytes:
    """The picture at a URL.

    Raises:
        BadPicture: `unreadable` if the server does not send it in time, `too_large`, or `format` if the body is
            not a picture and the server says so, such as a page of HTML.
        Fault: if no server has answered for the last pictures, although some did before.
        OSError: if this process has too many open files.
    """
    for number in range(1, TRIES + 1):
        try:
            data = _follow(url)
            answers.add(True)
            return data
        except _Again as failure:
            if number >= failure.tries:
                answers.add(False)
                raise BadPicture(
                    "unreadable", f"{failure} (tried {number} times): {shorten_url(url)}"
                ) from None
            time.sleep(max(PAUSE_S * 2 ** (number - 1), min(failure.pause_s, LONGEST_PAUSE_S)))
    raise AssertionError("unreachable: the last try returns or raises")


class _Again(Exception):
    """A failure that may not happen again."""

    def __init__(self, text: str, tries: int, pause_s: float = 0) -> None:
        super().__init__(text)
        self.tries, self.pause_s = min(tries, TRIES), pause_s


answers = Answers("web server", "the network")


class _Deadline:
    """Ends all connections of a try after `TOTAL_S`, because a server may send a byte now and then for ever, also while
    TLS begins. The look-up of names and the attempts to connect end with it, too."""

    def __init__(self) -> None:
        self.passed = False
        self._ends = time.monotonic() + TOTAL_S
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(TOTAL_S, self._end)
        self._timer.daemon = True

    def __enter__(self) -> "_Deadline":
        _current.deadline = self
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            for connection in self._sockets:
                connection.close()
            self._sockets.clear()

    def connect(
        self, address: tuple[str, int], timeout: float, source: tuple[str, int] | None = None
    ) -> socket.socket:
        """A connection to a host; like `socket.create_connection`."""
        failure: OSError = OSError("the host has no address")
        for family, kind, protocol, _, place in self._look_up(*address):
            connection = socket.socket(family, kind, protocol)
            try:
                with self._limited(timeout) as limit:
                    connection.settimeout(limit)
                    connection.connect(place)
                connection.settimeout(timeout)
                self._watch(connection)
                return connection
            except OSError as error:
                connection.close()
                failure = error
        raise failure

    def _look_up(self, host: str, port: int) -> list[Any]:
        """`socket.getaddrinfo`, which has no time-out of its own; its thread ends when the system gives up."""
        found: queue.SimpleQueue[list[Any] | OSError | UnicodeError] = queue.SimpleQueue()

        def look_up() -> None:
            try:
                found.put(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
            except (OSError, UnicodeError) as error:
                found.put(error)

        threading.Thread(target=look_up, daemon=True).start()
        with self._limited(SILENCE_S) as limit:
            try:
                result = found.get(timeout=limit)
            except queue.Empty:
                raise TimeoutError from None
        if isinstance(result, Exception):
            raise result
        return result

    @contextlib.contextmanager
    def _limited(self, timeout: float) -> Iterator[float]:
        """Yields the seconds that an action may take; the deadline has passed if it then takes too long because of it.

        Raises:
            TimeoutError: if there are none left.
        """
        left = self._ends - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            yield min(timeout, left)
        except TimeoutError:
            self.passed |= left < timeout
            raise

    def _watch(self, connection: socket.socket) -> None:
        """Ends a connection with this try. A duplicate is kept, because TLS takes the socket itself over."""
        with self._lock:
            self._sockets.append(connection.dup())
        if self.passed:
            self._end()

    def _end(self) -> None:
        self.passed = True
        with self._lock:
            for connection in self._sockets:
                with contextlib.suppress(OSError):  # closed meanwhile
                    connection.shutdown(socket.SHUT_RDWR)


_current = threading.local()


def _connect(
    address: tuple[str, int], timeout: float, source: tuple[str, int] | None = None
) -> socket.socket:
    deadline: _Deadline = _current.deadline
    return deadline.connect(address, timeout, source)


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        self._create_connection = _connect
        super().connect()


class _SecureConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        self._create_connection = _connect
        super().connect()


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Connection, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_SecureConnection, req)


def _make_opener() -> urllib.request.OpenerDirector:
    """An opener that knows web servers and proxies only, and follows no redirects."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _Http(),
        _Https(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", "uniemox-shards"), ("Accept", "image/*,*/*;q=0.5")]
    return opener


_opener = _make_opener()


def _follow(url: str) -> bytes:
    """The picture at a URL, or at the one to which its server redirects."""
    at = url
    with _Deadline() as deadline:
        for _ in range(REDIRECTS + 1):
            try:
                found = _request(at, url)
            except (OSError, http.client.HTTPException, ValueError, _Again) as error:
                if (
                    deadline.passed and getattr(error, "reason", "") != "too_large"
                ):  # it may have cut the body
                    raise _Again(f"not complete after {TOTAL_S:g} s", 2) from None
                if isinstance(error, BadPicture | _Again):
                    raise
                _raise_failure(error, url)
            if deadline.passed:
                raise _Again(f"not complete after {TOTAL_S:g} s", 2)
            if isinstance(found, bytes):
                return found
            at = found
    raise BadPicture("unreadable", f"more than {REDIRECTS} redirects: {shorten_url(url)}")


def _request(at: str, url: str) -> bytes | str:
    """The picture at `at`, or the URL to which the server redirects; `url` is named in failures."""
    address, user = _split_user(at)
    request = urllib.request.Request(_encode(address), headers=user)
    try:
        with _opener.open(request, timeout=SILENCE_S) as answer:
            data = _decode(_read_body(answer, url), answer.headers.get("content-encoding", ""), url)
            kind = answer.headers.get_content_type() if "content-type" in answer.headers else ""
            status = f"{answer.status} {answer.reason}".strip()
            part = answer.headers.get("content-range", "") if answer.status == 206 else ""
    except urllib.error.HTTPError as error:
        with error:
            return _redirected(error, at, url)
    if not data:
        raise BadPicture("empty", f"the server answers {status} without content: {shorten_url(url)}")
    if status.startswith("206") and not _is_whole(part):
        raise BadPicture("unreadable", f"the server answers {status}, only a part of it: {shorten_url(url)}")
    is_text = kind.startswith("text/") or kind in ("application/json", "application/xhtml+xml")
    if is_text and identify_format(data[:HEAD_BYTES]) is None:
        raise BadPicture("format", f"the server sent {kind}, not a picture: {shorten_url(url)}")
    if identify_format(data[:HEAD_BYTES]) is None:
        sent = f"the server answers {status} with {kind or 'bytes of no stated type'}"
        raise BadPicture("corrupt", f"not a picture of a known format; {sent}: {shorten_url(url)}")
    return data


def _split_user(url: str) -> tuple[str, dict[str, str]]:
    """A URL without user and password, and the header of basic authentication that replaces them."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    token = base64.b64encode(unquote(user if ":" in user else f"{user}:").encode()).decode()
    return parts._replace(netloc=host).geturl(), {"Authorization": f"Basic {token}"}


def _is_whole(content_range: str) -> bool:
    """Whether a range, such as `bytes 0-99/100`, is that of a whole file."""
    found = re.fullmatch(r"bytes 0-(\d+)/(\d+)", content_range.strip())
    return found is not None and int(found[1]) + 1 == int(found[2])


def _decode(data: bytes, encoding: str, url: str) -> bytes:
    """The content of a body that a server sent compressed, although it was not asked for that."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity") or not data or identify_format(data[:HEAD_BYTES]) is not None:
        return data
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise BadPicture(
            "format", f"the server sent it in Content-Encoding {encoding[:40]}: {shorten_url(url)}"
        )
    decoder = zlib.decompressobj(
        zlib.MAX_WBITS | 32
    )  # the heads of gzip and zlib are recognized automatically
    try:
        content = decoder.decompress(data, LARGEST_BYTES + 1)
    except zlib.error:
        detail = (
            f"the server sent bytes that are not in their Content-Encoding {encoding}: {shorten_url(url)}"
        )
        raise BadPicture("unreadable", detail) from None
    if len(content) > LARGEST_BYTES:
        raise BadPicture("too_large", f"more than {LARGEST_BYTES:,} bytes: {shorten_url(url)}")
    if not decoder.eof:
        raise _Again(f"the server sent only a part of the {encoding} data", 2)
    return content


def _encode(url: str) -> str:
    """A URL in ASCII: the host by IDNA, everything else by percent."""
    parts = urlsplit(url)
    if parts.hostname and not parts.netloc.isascii():
        host = parts.hostname.encode("idna").decode()
        url = parts._replace(netloc=f"{host}:{parts.port}" if parts.port else host).geturl()
    return quote(url, safe="%/:=&?~#+!$,;'@()*[]")


def _redirected(error: urllib.error.HTTPError, at: str, url: str) -> str:
    """The URL to which a server redirects."""
    location = error.headers.get("location")
    if error.code in _REDIRECTED and location:
        there = urljoin(at, location)
        if not is_web(there):
            detail = f"redirects to {shorten_url(location)}, which is not followed: {shorten_url(url)}"
            raise BadPicture("unreadable", detail)
        return there
    answer = f"the server answers {error.code} {error.reason}".strip()
    if error.code in _AGAIN:
        raise _Again(answer, TRIES, _seconds(error.headers.get("retry-after")))
    raise BadPicture("unreadable", f"{answer}: {shorten_url(url)}")


def _read_body(answer: Any, url: str) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := answer.read1(_CHUNK):
        parts.append(part)
        size += len(part)
        if size > LARGEST_BYTES:
            raise BadPicture("too_large", f"more than {LARGEST_BYTES:,} bytes: {shorten_url(url)}")
    stated = answer.headers.get("content-length")
    if not answer.chunked and stated is not None and stated.isdecimal() and size < int(stated):
        raise _Again(f"the server sent {size:,} of {int(stated):,} bytes", 2)
    return b"".join(parts)


def _raise_failure(error: Exception, url: str) -> NoReturn:
    """Raises what an exception of the network means for one picture, or for the pack."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, OSError):
        if cause.errno in OWN_LIMITS:
            raise cause
        if isinstance(cause, TimeoutError):
            raise _Again(f"no answer within {SILENCE_S:g} s", 2) from None
        is_final = isinstance(cause, ssl.SSLCertVerificationError) or (
            isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN
        )
        if not is_final:
            raise _Again(_text(cause), 2) from None
    elif isinstance(cause, http.client.HTTPException) and not isinstance(cause, http.client.InvalidURL):
        raise _Again(_text(cause), 2) from None
    raise BadPicture("unreadable", f"{_text(cause)}: {shorten_url(url)}") from None


def _text(cause: object) -> str:
    text = getattr(cause, "verify_message", None) or getattr(cause, "strerror", None) or str(cause)
    return " ".join((str(text) or type(cause).__name__).split())[:200]


def _seconds(value: str | None) -> float:
    return float(value) if value is not None and value.strip().isdecimal() else 0.0


def shorten_url(url: str) -> str:
    """A URL for a message: without keys, printable, at most 200 characters."""
    return "".join(c if c.isprintable() else "?" for c in hide_secrets(url)[:200])
