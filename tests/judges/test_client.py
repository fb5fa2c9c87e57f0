from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import threading
import time

import pytest

from jaxsteer.errors import UserError
from jaxsteer.judges import rubrics
from jaxsteer.judges.client import GIVE_UP, Answer, Client, Endpoint, Unanswered, check
from jaxsteer.judges.verdicts import Item
from tests.judges.scripted import Reply, Scripted, says, serve

# Makes the client repeat a call at once: its own pauses begin at half a second.
SOON = {"retry-after-ms": "1"}


def settings(server: Scripted, **changes) -> Endpoint:
    return dataclasses.replace(Endpoint(base_url=server.base_url, model="judge-9b"), **changes)


def ask(where: Endpoint, cache, count: int = 1, attempt: int = 0) -> list:
    """Answers, or exceptions, to `count` different questions asked at once."""

    async def go():
        async with Client(where, cache=cache) as client:
            asked = [[{"role": "user", "content": f"Grade reply {i}."}] for i in range(count)]
            calls = [client.ask(messages, attempt) for messages in asked]
            return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(go())


def test_a_good_reply_is_an_answer(tmp_path):
    with serve(says("fine")) as server:
        (answer,) = ask(settings(server), tmp_path)
    assert answer == Answer(text="fine", finish="stop")
    (sent,) = server.requests
    assert sent["model"] == "judge-9b" and sent["temperature"] == 0 and sent["stream"] is False
    assert sent["messages"] == [{"role": "user", "content": "Grade reply 0."}]


def test_a_second_run_sends_nothing(tmp_path):
    with serve(says("fine")) as server:
        first = ask(settings(server), tmp_path, count=5)
        assert len(server.requests) == 5
        second = ask(settings(server), tmp_path, count=5)
        assert len(server.requests) == 5
    assert first == second


@pytest.mark.parametrize(
    "change",
    [{"model": "other"}, {"max_tokens": 5}, {"omit": ("seed",)}],
)
def test_another_judge_is_asked_anew(tmp_path, change):
    with serve(says("fine")) as server:
        ask(settings(server), tmp_path)
        ask(settings(server, **change), tmp_path)
        assert len(server.requests) == 2


def test_another_attempt_is_drawn_anew_with_its_own_seed(tmp_path):
    with serve(says("fine")) as server:
        ask(settings(server), tmp_path, attempt=0)
        ask(settings(server), tmp_path, attempt=2)
    assert [(r["seed"], r["temperature"]) for r in server.requests] == [(0, 0.0), (2, 0.7)]


def test_speed_and_address_are_no_part_of_the_judge(tmp_path):
    with serve(says("fine")) as server:
        slow = settings(server, concurrency=1, rate=3.0, timeout=9.0)
        assert slow.identity() == settings(server, base_url="http://elsewhere/v1").identity()


def test_a_damaged_cache_entry_is_asked_again(tmp_path):
    with serve(says("fine")) as server:
        ask(settings(server), tmp_path)
        (entry,) = tmp_path.rglob("*.json")
        entry.write_bytes(b'{"text": "fi')
        (answer,) = ask(settings(server), tmp_path)
        assert answer.text == "fine" and len(server.requests) == 2
        ask(settings(server), tmp_path)
        assert len(server.requests) == 2


def test_retry_after_is_waited_for(tmp_path):
    times = []

    def script(body, n):
        times.append(time.monotonic())
        return Reply(429, {"Retry-After": "0.2"}) if n == 0 else says("fine")

    with serve(script) as server:
        (answer,) = ask(settings(server), tmp_path)
    assert answer.text == "fine"
    assert times[1] - times[0] >= 0.2


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_a_passing_problem_is_asked_again(tmp_path, status):
    with serve(lambda body, n: Reply(status, SOON) if n < 3 else says("fine")) as server:
        (answer,) = ask(settings(server), tmp_path)
        assert len(server.requests) == 4
    assert answer.text == "fine"


def test_a_problem_that_does_not_pass_leaves_the_row_without_a_reply(tmp_path):
    with serve(Reply(503, SOON, b"overloaded")) as server:
        (answer,) = ask(settings(server, attempts=3), tmp_path)
        assert len(server.requests) == 3
    assert isinstance(answer, Unanswered) and str(answer) == "HTTP 503 (overloaded)"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>proxy error</html>",
        b'{"choices": [{"message": {"content": "fi',
        b'{"choices": []}',
        b'{"error": {"message": "overloaded"}}',
        b'{"choices": [{"message": {"content": 5}}]}',
        b"\xff\xfe\x00garbage\x1b[31m",
        b"[" * 5000,
    ],
)
def test_a_malformed_reply_leaves_the_row_without_one_and_says_why(tmp_path, data):
    with serve(Reply(data=data)) as server:
        (answer,) = ask(settings(server), tmp_path)
    assert isinstance(answer, Unanswered)
    assert str(answer).startswith("the reply is not a chat completion (")
    assert str(answer).isprintable()


def test_a_silent_server_times_out(tmp_path):
    with serve(Reply(silent=True)) as server:
        (answer,) = ask(settings(server, timeout=0.2, attempts=2), tmp_path)
        assert len(server.requests) == 2
    assert isinstance(answer, Unanswered)
    assert "timed out" in str(answer) and "2 times" in str(answer)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (says(None), ""),
        (says(None, refusal="I can't grade this."), ""),
        (Reply(data=b'{"choices":[{"message":{"content":[{"type":"text","text":"a"}]}}]}'), "a"),
    ],
)
def test_other_forms_of_content_are_read(tmp_path, reply, text):
    with serve(reply) as server:
        (answer,) = ask(settings(server), tmp_path)
    assert answer.text == text


def test_a_content_filter_is_the_judges_refusal(tmp_path):
    filtered = Reply(400, data=b'{"error": {"code": "content_filter", "message": "blocked"}}')
    with serve(filtered) as server:
        answers = ask(settings(server), tmp_path, count=20)
    assert answers == [Answer(text="", finish="content_filter")] * 20


def test_a_bad_request_is_not_repeated(tmp_path):
    with serve(Reply(400, data=b"context length exceeded")) as server:
        (answer,) = ask(settings(server), tmp_path)
        assert len(server.requests) == 1
    assert str(answer) == "HTTP 400 (context length exceeded)"


def refusing(body, n):
    """A server of today: it wants the limit under its new name, and no temperature or seed."""
    wrong = next((name for name in ("max_tokens", "temperature", "seed") if name in body), None)
    if wrong is None:
        return says('{"coherence": 80}')
    words = f"Unsupported parameter: '{wrong}' is not supported. Use 'max_completion_tokens'."
    error = {"message": words, "param": wrong, "code": "unsupported_parameter"}
    return Reply(400, data=json.dumps({"error": error}).encode())


def test_a_refused_parameter_stops_the_run_on_its_first_row_with_the_flag_that_mends_it(tmp_path):
    items = [Item(row_id=f"r{i}", prompt="p", response=f"Text {i}.") for i in range(9)]
    mends = [
        ("give --max-completion-tokens N", {"limit_name": "max_completion_tokens"}),
        ("give --omit temperature", {"omit": ("temperature",)}),
        ("give --omit seed", {"omit": ("temperature", "seed")}),
    ]
    given: dict = {}
    with serve(refusing) as server:
        for calls, (message, mend) in enumerate(mends, start=1):
            client = Client(settings(server, **given), cache=tmp_path)
            with pytest.raises(UserError, match=message):
                asyncio.run(rubrics.ask_all(rubrics.coherence(), client, items, print))
            assert len(server.requests) == calls
            given |= mend
        kept: list = []
        client = Client(settings(server, max_tokens=99, **given), cache=tmp_path)
        asyncio.run(rubrics.ask_all(rubrics.coherence(), client, items, kept.extend))
    assert len(kept) == 9 and {finding.score for _, finding in kept} == {80.0}
    assert server.requests[-1]["max_completion_tokens"] == 99


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ('{"error": {"message": "Unrecognized request argument: seed"}}', "--omit seed"),
        ('{"detail": [{"loc": ["seed"], "msg": "Extra inputs are not permitted"}]}', "--omit seed"),
        ("max_completion_tokens: unknown field", "give --max-tokens N instead"),
        ("'max_tokens' or 'max_completion_tokens' is too large: 768", ""),
        ("This model's maximum context is 4096, you asked for max_tokens 768", ""),
    ],
)
def test_a_400_stops_the_run_only_if_it_refuses_a_parameter(tmp_path, text, flag):
    with serve(Reply(400, data=text.encode())) as server:
        (answer,) = ask(settings(server), tmp_path)
    assert isinstance(answer, UserError if flag else Unanswered)
    assert flag in str(answer)


def test_azure_gets_its_key_in_a_header_and_its_version_in_the_address(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "azure-secret")
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "of-another-service")
    with serve(says("fine")) as server:
        where = settings(server, key_variable="MY_KEY", api_version="2024-10-21")
        (answer,) = ask(where, tmp_path)
    assert answer.text == "fine"
    assert server.paths == ["/v1/deployments/judge-9b/chat/completions?api-version=2024-10-21"]
    assert server.headers[0]["api-key"] == "azure-secret"
    assert "authorization" not in server.headers[0]


@pytest.mark.parametrize("status", [401, 403, 404, 405, 302])
def test_an_error_that_every_row_would_get_stops_the_run(tmp_path, status):
    with serve(Reply(status, {"Location": "http://127.0.0.1:9/"})) as server:
        (answer,) = ask(settings(server), tmp_path)
        assert len(server.requests) == 1
    assert isinstance(answer, UserError)
    assert f"HTTP {status}; check --base-url, --judge-model and the key" in str(answer)


def test_a_server_that_fails_many_rows_in_a_row_stops_the_run(tmp_path):
    with serve(Reply(422, data=b"unknown model")) as server:
        answers = ask(settings(server, concurrency=1), tmp_path, count=GIVE_UP)
    assert sum(isinstance(answer, UserError) for answer in answers) == 1
    assert any("8 rows in a row got no reply" in str(answer) for answer in answers)


def test_an_address_without_a_server_stops_the_run(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        where = Endpoint(base_url=url, model="m", attempts=1)
        answers = ask(where, tmp_path, count=GIVE_UP)
    assert any(isinstance(a, UserError) and "ConnectError" in str(a) for a in answers)


def test_a_long_retry_after_stops_the_run(tmp_path):
    with serve(Reply(429, {"Retry-After": "3600"}, b"daily quota")) as server:
        (answer,) = ask(settings(server), tmp_path)
        assert len(server.requests) == 1
    assert isinstance(answer, UserError)
    assert "HTTP 429 (daily quota); it asks to wait 3600 s" in str(answer)


def test_as_many_calls_are_in_flight_as_allowed_and_no_more(tmp_path):
    items = [Item(row_id=f"r{i}", prompt="p", response=f"{i}") for i in range(25)]
    kept: list = []
    # Each call but the first, which is made alone, waits for two more: it takes three to go on.
    together = threading.Barrier(3, timeout=30)

    def script(body, n):
        if n:
            together.wait()
        return says('{"coherence": 80}')

    with serve(script) as server:
        client = Client(settings(server, concurrency=3), cache=tmp_path)
        asyncio.run(rubrics.ask_all(rubrics.coherence(), client, items, kept.extend))
    assert len(kept) == 25 and server.at_once == 3


def test_calls_are_spaced_by_the_rate_repeated_ones_too(tmp_path):
    times = []

    def script(body, n):
        times.append(time.monotonic())
        return Reply(429, SOON) if n == 0 else says("fine")

    with serve(script) as server:
        ask(settings(server, rate=1200.0), tmp_path, count=3)
    # The last of four calls leaves at least three intervals of 1/20 s after the first.
    assert len(times) == 4 and max(times) - min(times) >= 0.14


def test_the_key_comes_from_the_environment_and_is_in_no_message(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    with serve(Reply(401, data=b"wrong key sk-secret-123")) as server:
        (answer,) = ask(settings(server, key_variable="MY_KEY"), tmp_path)
        assert server.headers[0]["authorization"] == "Bearer sk-secret-123"
    assert "sk-secret" not in str(answer) and "[key]" in str(answer)


def test_without_a_key_none_is_sent(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXSTEER_JUDGE_KEY", raising=False)
    # The client library would take a key of its own from here.
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    with serve(says("fine")) as server:
        ask(settings(server), tmp_path)
    assert "authorization" not in server.headers[0]


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "file:///etc/passwd",
        "http://[::1",
        "http://x\n/v1",
        "http://\udcff/v1",
        "http://a b/v1",
        f"http://{'ü' * 70}/v1",
        "http://me:pw@host/v1",
        "http://host/v1?key=1",
    ],
)
def test_an_address_of_another_form_is_refused_without_being_quoted(url):
    with pytest.raises(UserError, match="not a plain web address") as caught:
        check(Endpoint(base_url=url, model="m"))
    assert url not in str(caught.value)


@pytest.mark.parametrize("url", ["http://[::1]:8000/v1", "https://api.example.com", "http://h/v1/"])
def test_a_plain_address_is_accepted(url):
    check(Endpoint(base_url=url, model="m"))


def test_only_some_parameters_can_be_left_out():
    with pytest.raises(UserError, match="can be left out"):
        check(Endpoint(base_url="http://h/v1", model="m", omit=("messages",)))


def test_a_key_with_a_line_break_is_refused(monkeypatch):
    monkeypatch.setenv("JAXSTEER_JUDGE_KEY", "sk\nX-Evil: 1")
    with pytest.raises(UserError, match="control characters"):
        check(Endpoint(base_url="http://127.0.0.1:9/v1", model="m"))
