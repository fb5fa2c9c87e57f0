"""Ask a chat model behind any OpenAI-compatible endpoint, patiently, and never twice the same.

Calls go out at most `concurrency` at a time and `rate` a minute. What may pass (a timeout, a lost
connection, 408, 425, 429, 5xx, a reply that is no JSON) is asked again after an exponential,
jittered pause, or after the one that `Retry-After` names, which holds for all calls. What will not
pass stops the run with what is done kept: a refused key, a wrong address, a server that fails
`GIVE_UP` rows in a row. Well-formed replies are cached by the content of the request, so running
again is free.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import os
import random
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from jaxsteer.data.wheels import cache_dir
from jaxsteer.errors import UserError
from jaxsteer.files import canonical_json, sha256_bytes, write_text
from jaxsteer.terminal import plain

Messages = Sequence[Mapping[str, str]]
OMITTABLE = ("temperature", "seed", "max_tokens")
GIVE_UP = 8
# Longest pause we take on our own, and the longest that a server may ask for.
LONGEST_PAUSE, LONGEST_WAIT = 30.0, 120.0
_LARGEST = 4 << 20
_PASSING = {408, 409, 425, 429}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a judge answers and how it is asked.

    Attributes:
      base_url: of the API, up to and without /chat/completions.
      model: the judge model's name there.
      concurrency: calls in flight.
      rate: calls a minute; None is no limit.
      timeout: seconds for one call.
      attempts: calls for one reply before the row is given up.
      max_tokens: longest judge reply.
      temperature: of the first attempt at a reply.
      retry_temperature: of further attempts, when the first reply could not be read.
      omit: request parameters not sent, for servers that refuse them (of `OMITTABLE`).
      key_variable: environment variable with the API key; unset sends none.
    """

    base_url: str
    model: str
    concurrency: int = 8
    rate: float | None = None
    timeout: float = 60.0
    attempts: int = 5
    max_tokens: int = 768
    temperature: float = 0.0
    retry_temperature: float = 0.7
    omit: tuple[str, ...] = ()
    key_variable: str = "JAXSTEER_JUDGE_KEY"

    def identity(self) -> dict[str, Any]:
        """What can change a verdict; neither address nor speed can."""
        return {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "retry_temperature": self.retry_temperature,
            "omit": sorted(self.omit),
        }

    def body(self, messages: Messages, attempt: int) -> dict[str, Any]:
        """The request. A further attempt draws anew: its own seed, and a temperature."""
        sent = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "temperature": self.retry_temperature if attempt else self.temperature,
            "seed": attempt,
            "max_tokens": self.max_tokens,
            "stream": False,
        }
        return {name: value for name, value in sent.items() if name not in self.omit}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A well-formed reply of the endpoint.

    Attributes:
      text: what the model said; "" for nothing.
      finish: why it ended, as the server says: `stop`, `length`, `content_filter`...
      refusal: the server's own refusal field, or "".
    """

    text: str
    finish: str = ""
    refusal: str = ""


class Unanswered(Exception):
    """One row got no reply; its message is the reason. The next run asks again."""


class _Message(msgspec.Struct):
    content: str | list[dict[str, Any]] | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class _Again(Exception):
    """A call that may succeed later, and after how many seconds the server wants it."""

    def __init__(self, reason: str, after: float | None = None):
        super().__init__(reason)
        self.after = after


def check(endpoint: Endpoint) -> None:
    """Refuse settings that cannot work, before anything is sent.

    Raises:
      UserError: an address that is none or carries a password, or a bad setting.
    """
    url = endpoint.base_url
    if " " in url or not url.isprintable():
        raise _no_address(url)
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        raise _no_address(url) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise _no_address(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            "--base-url may not hold a password or parameters, since it is recorded; put the key "
            f"into the environment variable {endpoint.key_variable}"
        )
    if not endpoint.model.isprintable():
        raise UserError(
            f"--judge-model {endpoint.model!a} holds characters that no name has; give it in UTF-8"
        )
    unknown = set(endpoint.omit) - set(OMITTABLE)
    if unknown:
        raise UserError(f"--omit {min(unknown)}: only {', '.join(OMITTABLE)} can be left out")
    key = os.environ.get(endpoint.key_variable, "")
    if key != key.strip() or not key.isascii() or not key.isprintable():
        raise UserError(f"${endpoint.key_variable} holds spaces or control characters; set it anew")


def _no_address(url: str) -> UserError:
    return UserError(f"--base-url {url!a} is no address; give one such as http://127.0.0.1:8000/v1")


class Client:
    """Asks one endpoint; use it as `async with Client(endpoint) as client`.

    `sleep` and `clock` are the event loop's unless a test brings its own.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        cache: Path | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ):
        check(endpoint)
        try:
            import httpx2
        except ImportError:
            raise UserError(
                "judging over HTTP needs the extra: pip install 'jaxsteer[judges]'"
            ) from None
        self.endpoint = endpoint
        self.cache = cache or cache_dir() / "judge-replies"
        self.sleep, self.clock, self.jitter = sleep, clock, jitter
        self.url = endpoint.base_url.rstrip("/") + "/chat/completions"
        try:
            httpx2.URL(self.url)
        except httpx2.InvalidURL:
            raise _no_address(endpoint.base_url) from None
        self.key = os.environ.get(endpoint.key_variable, "")
        self.sent = 0
        self.next_slot = self.not_before = 0.0
        self.failed_in_a_row = 0
        self.httpx = httpx2
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.http = httpx2.AsyncClient(
            headers=headers,
            timeout=endpoint.timeout,
            limits=httpx2.Limits(max_connections=endpoint.concurrency),
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def ask(self, messages: Messages, attempt: int = 0) -> Answer:
        """The model's answer, from the cache if it has been given before.

        Args:
          messages: the conversation.
          attempt: 0, or how many answers to it could not be read.

        Raises:
          Unanswered: no reply for this row.
          UserError: no reply for any row.
        """
        body = self.endpoint.body(messages, attempt)
        place = self._place(body, attempt)
        known = _cached(place)
        if known is not None:
            return known
        try:
            answer = await self._ask(body)
        except Unanswered as error:
            self.failed_in_a_row += 1
            if self.failed_in_a_row >= GIVE_UP:
                raise UserError(
                    f"{self.url}: {GIVE_UP} rows in a row got no reply ({error}); mend that and "
                    "run again, what is judged is kept"
                ) from None
            raise
        self.failed_in_a_row = 0
        write_text(place, canonical_json(dataclasses.asdict(answer)))
        return answer

    def _place(self, body: dict[str, Any], attempt: int) -> Path:
        key = sha256_bytes(canonical_json([self.url, attempt, body]).encode("utf-8", "replace"))
        return self.cache / key[:2] / f"{key}.json"

    async def _ask(self, body: dict[str, Any]) -> Answer:
        tries = self.endpoint.attempts
        for attempt in range(tries):
            await self._turn()
            try:
                return await self._call(body)
            except _Again as error:
                if error.after is not None and error.after > LONGEST_WAIT:
                    raise UserError(
                        f"{self.url} asks to wait {error.after:.0f} s ({error}); run again then, "
                        "what is judged is kept"
                    ) from None
                if attempt + 1 == tries:
                    raise Unanswered(f"{error}, {tries} times") from None
                if error.after is not None:
                    self.not_before = max(self.not_before, self.clock() + error.after)
                else:
                    await self.sleep(min(LONGEST_PAUSE, 2.0**attempt) * (0.5 + self.jitter() / 2))
        raise AssertionError("attempts is at least 1")

    async def _turn(self) -> None:
        """Wait for this call's turn: `rate` a minute, and not in a pause the server asked for."""
        slot = 0.0
        if self.endpoint.rate:
            slot = max(self.clock(), self.next_slot)
            self.next_slot = slot + 60.0 / self.endpoint.rate
        # The pause may grow while this call waits, so look again after each sleep.
        while (wait := max(slot, self.not_before) - self.clock()) > 0:
            await self.sleep(wait)

    async def _call(self, body: dict[str, Any]) -> Answer:
        self.sent += 1
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                async with self.http.stream("POST", self.url, json=body) as response:
                    status, headers = response.status_code, response.headers
                    data = b""
                    async for chunk in response.aiter_bytes():
                        data += chunk
                        if len(data) > _LARGEST:
                            raise Unanswered(f"the reply is over {_LARGEST >> 20} MiB")
        except (TimeoutError, self.httpx.TimeoutException):
            raise _Again(f"no reply within {self.endpoint.timeout:g} s") from None
        except self.httpx.HTTPError as error:
            raise _Again(self._clean(f"{type(error).__name__}: {error}")) from None
        if status == 400 and b"content_filter" in data:
            # Some services refuse this way: it is the judge's answer, and the same each time.
            return Answer(text="", finish="content_filter")
        if status != 200:
            self._refused(status, headers, data)
        try:
            completion = msgspec.json.decode(data, type=_Completion)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _Again(self._clean(f"a reply that is no chat completion ({error})")) from None
        if not completion.choices:
            raise _Again("a chat completion without choices")
        choice = completion.choices[0]
        return Answer(
            text=_text(choice.message.content),
            finish=choice.finish_reason or "",
            refusal=choice.message.refusal or "",
        )

    def _refused(self, status: int, headers: Mapping[str, str], data: bytes) -> None:
        said = self._clean(data[:300].decode("utf-8", "replace"))
        reason = f"HTTP {status}" + (f" ({said})" if said else "")
        if status in _PASSING or status >= 500:
            raise _Again(reason, retry_after(headers))
        if status in (401, 403):
            raise UserError(
                f"{self.url} refuses the key: {reason}; set {self.endpoint.key_variable}"
            )
        if status in (404, 405) or 300 <= status < 400:
            raise UserError(f"{self.url} is not there: {reason}; check --base-url, --judge-model")
        raise Unanswered(reason)

    def _clean(self, text: str) -> str:
        """A server's words, fit for one line: no key, no control characters, short."""
        if self.key:
            text = text.replace(self.key, "[key]")
        return plain(" ".join(text.split()))[:160]


def retry_after(headers: Mapping[str, str], now: Callable[[], float] = time.time) -> float | None:
    """Seconds that a server asks to wait, from Retry-After (seconds or a date); None if it doesn't.

    >>> retry_after({"retry-after": "2.5"})
    2.5
    >>> retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, now=lambda: 30.0)
    30.0
    """
    value = headers.get("retry-after")
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now()
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if seconds < float("inf") else None


def _cached(place: Path) -> Answer | None:
    try:
        return msgspec.json.decode(place.read_bytes(), type=Answer)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        # Not there, or damaged: ask.
        return None


def _text(content: str | list[dict[str, Any]] | None) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content or ""
