"""HTTP as an API needs it: one connection pool, a deadline for the whole exchange, failures in the words of api_client.py.

The token comes from an environment variable when a request is sent. It is in no message, store or `repr`, and redirects, which
could carry it elsewhere, are not followed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from spolia.errors import SpoliaError
from spolia.parts.api_answers import Misfit
from spolia.parts.api_client import Passing, TooLarge

_LONGEST_SAID = 200  # characters of another program's words that are shown
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_HERE = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Auth:
    """A header with the value of an environment variable."""

    variable: str
    header: str = "Authorization"
    scheme: str = "Bearer"

    def headers(self) -> dict[str, str]:
        value = os.environ.get(self.variable, "")
        if not value or not value.isascii() or not value.isprintable():
            what = "is not set" if not value else "holds what no header can carry"
            raise SpoliaError(what, where=self.variable, mend=f"export {self.variable}=… in the shell that runs this")
        return {self.header: f"{self.scheme} {value}" if self.scheme else value}


class Reply(NamedTuple):
    """Of status 200."""

    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON. Misfit where it is none, or an error under a status that says all is well."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            raise Misfit(f"no JSON: {said(self.body)}") from None
        return not_an_error(value)


class Session:
    """Requests below one address. Safe for several threads. `most`: bytes of an answer that are read."""

    def __init__(self, url: str, *, auth: Auth | None = None, timeout: float = 30.0, most: int = 64_000_000):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SpoliaError(
                "is no address of HTTP", where=url.partition("?")[0], mend="write http://HOST:PORT or https://HOST"
            )
        if parts.username or parts.password or parts.query:
            mend = "name an environment variable that holds the token: it is written nowhere then"
            raise SpoliaError("carries a name, a password or a query", where=parts.hostname, mend=mend)
        self.url, self.auth, self.timeout, self.most = url.rstrip("/"), auth, timeout, most
        self._local = parts.hostname in _HERE
        self._client: Any = None
        self._lock = threading.Lock()

    def get(self, path: str) -> Reply:
        return self._exchange("GET", path, b"", {})

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        return self._exchange("POST", path, body, headers)

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _exchange(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        import httpx

        own = {"Accept-Encoding": "identity", **headers, **(self.auth.headers() if self.auth else {})}
        url, end = f"{self.url}/{path}" if path else self.url, time.monotonic() + self.timeout
        try:
            with self._opened().stream(method, url, content=body or None, headers=own) as response:
                found = self._read(response, end)
                self._check(response, found, url)
                return Reply(response.headers, found)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise Passing(f"no connection to {self.url}: {said(str(error))}") from None
        except httpx.TimeoutException:
            raise Passing(f"silent for {self.timeout:g} s", served=True) from None
        except httpx.TransportError as error:
            raise Passing(f"cut short: {said(str(error))}", served=True) from None
        except httpx.DecodingError as error:
            raise Misfit(f"cannot be unpacked: {said(str(error))}") from None

    def _read(self, response: Any, end: float) -> bytes:
        """The whole body, in time and of bearable size."""
        found, size = [], 0
        for part in response.iter_bytes():
            size += len(part)
            if size > self.most:
                raise Misfit(f"more than {self.most:,} bytes")
            if time.monotonic() > end:
                raise Passing(f"not done after {self.timeout:g} s: {size} bytes came", served=True)
            found.append(part)
        return b"".join(found)

    def _check(self, response: Any, body: bytes, url: str) -> None:
        """What a status other than 200 means."""
        status = response.status_code
        if status == 200:
            return
        what = f"status {status}: {said(body)}"
        if status in _PASSING:
            raise Passing(what, _seconds(response.headers.get("retry-after")))
        if status == 413:
            raise TooLarge(what)
        if 300 <= status < 400:
            raise SpoliaError(f"{what}; it is moved", where=url, mend="give the address that it has now")
        mend = "look at the address and the model's name"
        if status in (401, 403):
            mend = f"look at {self.auth.variable}" if self.auth else "name the environment variable of its token"
        raise SpoliaError(f"refused with {what}", where=url, mend=mend)

    def _opened(self) -> Any:
        with self._lock:
            if self._client is None:
                import httpx

                self._client = httpx.Client(
                    timeout=self.timeout,
                    http2=importlib.util.find_spec("h2") is not None,  # where the other side offers it, over TLS
                    limits=httpx.Limits(max_connections=64, max_keepalive_connections=64, keepalive_expiry=60.0),
                    follow_redirects=False,
                    trust_env=not self._local,  # a proxy does not lead back to this machine
                )
            return self._client


def check_installed() -> None:
    """SpoliaError where what speaks HTTP is not there."""
    if importlib.util.find_spec("httpx") is None:
        raise SpoliaError("the package httpx is not installed", where="API over HTTP", mend="pip install 'spolia[api]'")


def not_an_error(value: Any) -> Any:
    """`value`. Misfit where it is a mapping that tells of an error."""
    if isinstance(value, dict) and value.get("error"):
        raise Misfit(f"an error under status 200: {said(str(value['error']))}")
    return value


def said(words: bytes | str) -> str:
    """What another program wrote, short and printable."""
    text = words.decode("utf-8", "replace") if isinstance(words, bytes) else words
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * _LONGEST_SAID]).split())
    return (text[:_LONGEST_SAID] + " …" if len(text) > _LONGEST_SAID else text) or "nothing"


def _seconds(text: str | None) -> float | None:
    """Retry-After: seconds, or a date."""
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), 3600.0) if seconds == seconds else None
