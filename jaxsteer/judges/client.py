"""Ask a chat model behind an OpenAI-compatible endpoint, and cache its replies.

The `openai` client makes the calls. It repeats a call after a timeout, a lost connection or status
408, 409, 429 or 5xx, with growing, jittered pauses, and waits as long as `Retry-After` says, up to
two minutes. This module adds a limit on calls per minute and a cache, and decides when to stop the
run: at a refused key, a wrong address, a longer `Retry-After`, or `GIVE_UP` rows in a row that got
no reply. Replies are cached under the hash of the request, so a second run costs nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from jaxsteer.data.wheels import cache_dir
from jaxsteer.errors import UserError
from jaxsteer.files import canonical_json, sha256_bytes, write_text
from jaxsteer.words import plain

if TYPE_CHECKING:
    import openai

Messages = Sequence[Mapping[str, str]]
OMITTABLE = ("temperature", "seed", "max_tokens")
_NAMED = re.compile(r"\b(max_tokens|max_completion_tokens|temperature|seed)\b")
# Of the token limit's two names, a server that refuses one takes the other.
OTHER_FLAG = {
    "max_tokens": "--max-completion-tokens N",
    "max_completion_tokens": "--max-tokens N instead",
}
# A parameter may also be named for what is wrong with one row, such as its length.
_REFUSED = re.compile(
    r"unsupported|not (support|permitted|allowed)|unrecogni[sz]ed|unknown|unexpected", re.IGNORECASE
)
GIVE_UP = 8
# Seconds of Retry-After that the openai client waits at most (its MAX_RETRY_AFTER_DELAY).
LONGEST_WAIT = 120
_ADDRESS = re.compile(r"https?://([\w.-]+|\[[\da-f:]+\])(:\d{1,5})?(/[\w./~-]*)?", re.ASCII)
# Temperature of the first reply, and of those after a reply that could not be read.
TEMPERATURES = (0.0, 0.7, 0.7)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a judge model answers, and how it is asked.

    Attributes:
      base_url: of the API, up to and without /chat/completions.
      model: the judge model's name at the endpoint.
      concurrency: calls at the same time.
      rate: calls per minute; None is no limit.
      timeout: seconds to wait for the server in one call.
      attempts: calls for one reply before the row is left without one.
      max_tokens: longest judge reply.
      limit_name: the parameter that carries this limit.
      api_version: of an Azure endpoint, which takes it as a parameter of the address and the key in
        a header of its own; "" for any other endpoint.
      omit: request parameters not to send, for servers that reject them (of `OMITTABLE`).
      key_variable: environment variable that holds the API key; if it is unset, no key is sent.
    """

    base_url: str
    model: str
    concurrency: int = 8
    rate: float | None = None
    timeout: float = 60.0
    attempts: int = 5
    max_tokens: int = 768
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    api_version: str = ""
    omit: tuple[str, ...] = ()
    key_variable: str = "JAXSTEER_JUDGE_KEY"

    def identity(self) -> dict[str, Any]:
        """The settings that can change a verdict; address and speed cannot."""
        return {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperatures": list(TEMPERATURES),
            "omit": sorted(self.omit),
        }

    def body(self, messages: Messages, attempt: int) -> dict[str, Any]:
        """The request; each attempt has its own seed."""
        body = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "temperature": TEMPERATURES[attempt],
            "seed": attempt,
            self.limit_name: self.max_tokens,
            "stream": False,
        }
        return {name: value for name, value in body.items() if name not in self.omit}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A well-formed reply of the endpoint.

    Attributes:
      text: what the model wrote; "" for nothing.
      finish: why it ended, in the server's words: `stop`, `length`, `content_filter`...
      refusal: the server's refusal field, or "".
    """

    text: str
    finish: str = ""
    refusal: str = ""


class Unanswered(Exception):
    """One row got no reply; the message is the reason. The next run asks again."""


class _Part(msgspec.Struct):
    text: str = ""


class _Message(msgspec.Struct):
    content: str | list[_Part] | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]


def check(endpoint: Endpoint) -> None:
    """Reject settings that cannot work, before anything is sent.

    Raises:
      UserError: an address of another form (the message does not quote it, since a password may be
        part of it), an unknown parameter to omit, or a key with spaces or control characters.
    """
    variable = endpoint.key_variable
    if not _ADDRESS.fullmatch(endpoint.base_url):
        raise UserError(
            "--base-url is not a plain web address such as http://127.0.0.1:8000/v1 (without "
            f"password or parameters: put the key into the environment variable {variable})"
        )
    unknown = set(endpoint.omit) - set(OMITTABLE)
    if unknown:
        raise UserError(f"--omit {min(unknown)}: only {', '.join(OMITTABLE)} can be left out")
    if not re.fullmatch(r"[!-~]*", os.environ.get(variable, "")):
        raise UserError(f"${variable} holds spaces or control characters; set it again")


class Client:
    """Asks one endpoint: `async with Client(endpoint) as client: await client.ask(...)`."""

    def __init__(self, endpoint: Endpoint, *, cache: Path | None = None):
        check(endpoint)
        try:
            import openai
        except ImportError:
            raise UserError(
                "judging over HTTP needs the extra: pip install 'jaxsteer[judges]'"
            ) from None
        self.endpoint = endpoint
        self.cache = cache or cache_dir() / "judge-replies"
        self.url = endpoint.base_url.rstrip("/") + "/chat/completions"
        self.key = os.environ.get(endpoint.key_variable, "")
        self.failed_in_a_row = 0
        self.next_call = asyncio.Lock()
        # The openai client accepts no empty key, so without a key its header is left out.
        self.headers = {} if self.key else {"Authorization": openai.Omit()}
        azure = {"api_version": endpoint.api_version} if endpoint.api_version else {}
        make: Any = openai.AsyncAzureOpenAI if azure else openai.AsyncOpenAI
        self.openai = make(
            **azure,
            base_url=endpoint.base_url,
            api_key=self.key or "none",
            max_retries=endpoint.attempts - 1,
            timeout=endpoint.timeout,
            http_client=openai.DefaultAsyncHttpxClient(
                # A hook sees repeated calls too.
                event_hooks={"request": [self._space]},
                follow_redirects=False,
            ),
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.openai.close()

    async def _space(self, request: object) -> None:
        """Delay calls so that at most `rate` per minute are made."""
        if self.endpoint.rate:
            async with self.next_call:
                await asyncio.sleep(60.0 / self.endpoint.rate)

    async def ask(self, messages: Messages, attempt: int = 0) -> Answer:
        """The model's answer, from the cache if the same was asked before.

        Args:
          messages: the conversation.
          attempt: how many answers to it could not be read, less than `len(TEMPERATURES)`.

        Raises:
          Unanswered: no reply for this row.
          UserError: an error that every other row would get too.
        """
        body = self.endpoint.body(messages, attempt)
        request = canonical_json([self.url, attempt, body]).encode("utf-8", "replace")
        key = sha256_bytes(request)
        path = self.cache / key[:2] / f"{key}.json"
        cached = _cached(path)
        if cached is not None:
            return cached
        try:
            answer = await self._call(body)
        except Unanswered as error:
            self.failed_in_a_row += 1
            if self.failed_in_a_row >= GIVE_UP:
                raise UserError(
                    f"{self.url}: {GIVE_UP} rows in a row got no reply ({error}); solve that and "
                    "run again; the verdicts so far are kept"
                ) from None
            raise
        self.failed_in_a_row = 0
        write_text(path, canonical_json(dataclasses.asdict(answer)))
        return answer

    async def _call(self, body: dict[str, Any]) -> Answer:
        import openai

        try:
            reply = await self.openai.chat.completions.with_raw_response.create(
                **body, extra_headers=self.headers
            )
            completion = msgspec.json.decode(reply.http_response.content, type=_Completion)
        except openai.APIConnectionError as error:
            reason = f"{error} {error.__cause__!r}, {self.endpoint.attempts} times"
            raise Unanswered(self._clean(reason)) from None
        except openai.APIStatusError as error:
            return self._rejected(error)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            reason = f"the reply is not a chat completion ({error})"
            raise Unanswered(self._clean(reason)) from None
        choice = completion.choices[0]
        content = choice.message.content or ""
        return Answer(
            text=content if isinstance(content, str) else "".join(part.text for part in content),
            finish=choice.finish_reason or "",
            refusal=choice.message.refusal or "",
        )

    def _rejected(self, error: openai.APIStatusError) -> Answer:
        """What an error status means: the judge's answer, no reply for a row, or for any row."""
        if error.code == "content_filter":
            # Some services refuse this way: it is the judge's answer, and always the same.
            return Answer(text="", finish="content_filter")
        status, text = error.status_code, self._clean(error.response.text)
        reason = f"HTTP {status} ({text})" if text else f"HTTP {status}"
        wait = error.response.headers.get("retry-after", "")
        named = _NAMED.search(f"{error.param} {error.response.text}")
        if status in (400, 422) and named and _REFUSED.search(error.response.text):
            mend = f"give {OTHER_FLAG.get(named[1], f'--omit {named[1]}')}"
        elif status < 400 or status in (401, 403, 404, 405):
            mend = f"check --base-url, --judge-model and the key in {self.endpoint.key_variable}"
        elif wait.isdecimal() and int(wait) > LONGEST_WAIT:
            mend = f"it asks to wait {wait} s; run again then, verdicts so far are kept"
        else:
            raise Unanswered(reason) from None
        raise UserError(f"{self.url} answers {reason}; {mend}") from None

    def _clean(self, text: str) -> str:
        """A server's words for one line of ours: no key, no control characters, short."""
        if self.key:
            text = text.replace(self.key, "[key]")
        return plain(" ".join(text.split()))[:160]


def _cached(path: Path) -> Answer | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Answer)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        # Absent or damaged: ask again.
        return None
