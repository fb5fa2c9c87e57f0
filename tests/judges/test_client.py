from __future__ import annotations

import asyncio
import dataclasses
import socket
import threading

import pytest

from jaxsteer.errors import UserError
from jaxsteer.judges import client as endpoint
from jaxsteer.judges.client import Answer, Client, Endpoint, Unanswered, retry_after
from tests.judges.scripted import Reply, Scripted, says, serve

ASKED = [{"role": "user", "content": "Grade this."}]


class Clock:
    """Time that passes only by sleeping, so that no test waits."""

    def __init__(self):
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def settings(server: Scripted, **changes) -> Endpoint:
    return dataclasses.replace(Endpoint(base_url=server.base_url, model="judge-9b"), **changes)


def ask(where: Endpoint, cache, count: int = 1, attempt: int = 0, clock: Clock | None = None):
    """Answers, or exceptions, to `count` different questions asked at once, and the clock."""
    clock = clock or Clock()

    async def go():
        async with Client(
            where, cache=cache, sleep=clock.sleep, clock=clock, jitter=lambda: 1.0
        ) as client:
            asked = [[{"role": "user", "content": f"Grade reply {i}."}] for i in range(count)]
            calls = [client.ask(messages, attempt) for messages in asked]
            return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(go()), clock


def test_a_good_reply_is_an_answer(tmp_path):
    with serve(says("coherence: 80")) as server:
        (answer,), clock = ask(settings(server), tmp_path)
    assert answer == Answer(text="coherence: 80", finish="stop")
    assert clock.slept == []
    (sent,) = server.requests
    assert sent["model"] == "judge-9b" and sent["temperature"] == 0 and sent["stream"] is False
    assert sent["messages"] == [{"role": "user", "content": "Grade reply 0."}]


def test_a_second_run_sends_nothing(tmp_path):
    with serve(says("fine")) as server:
        first, _ = ask(settings(server), tmp_path, count=5)
        assert len(server.requests) == 5
        second, _ = ask(settings(server), tmp_path, count=5)
        assert len(server.requests) == 5
    assert first == second


@pytest.mark.parametrize(
    "change",
    [{"model": "other"}, {"max_tokens": 5}, {"temperature": 0.5}, {"omit": ("seed",)}],
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
        (answer,), _ = ask(settings(server), tmp_path)
        assert answer.text == "fine" and len(server.requests) == 2
        ask(settings(server), tmp_path)
        assert len(server.requests) == 2


def test_retry_after_is_waited_for(tmp_path):
    def script(body, n):
        return Reply(429, {"Retry-After": "7"}) if n == 0 else says("fine")

    with serve(script) as server:
        (answer,), clock = ask(settings(server), tmp_path)
    assert answer.text == "fine"
    assert clock.slept == [7.0]


def test_a_pause_that_the_server_asks_for_holds_for_all_calls(tmp_path):
    def script(body, n):
        return Reply(429, {"Retry-After": "7"}) if n == 0 else says("fine")

    with serve(script) as server:
        where, clock = settings(server), Clock()

        async def go():
            client = Client(where, cache=tmp_path, sleep=clock.sleep, clock=clock)
            async with client:
                await client.ask([{"role": "user", "content": "one"}])
                before = clock.now
                client.not_before = clock.now + 5
                await client.ask([{"role": "user", "content": "two"}])
                return clock.now - before

        assert asyncio.run(go()) == 5.0


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_what_may_pass_is_asked_again_after_growing_pauses(tmp_path, status):
    def script(body, n):
        return Reply(status) if n < 3 else says("fine")

    with serve(script) as server:
        (answer,), clock = ask(settings(server), tmp_path)
        assert len(server.requests) == 4
    assert answer.text == "fine"
    assert clock.slept == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no chat completion"),
        (b"<html>proxy error</html>", "no chat completion"),
        (b'{"choices": [{"message": {"content": "fi', "no chat completion"),
        (b'{"choices": []}', "without choices"),
        (b'{"error": {"message": "overloaded"}}', "no chat completion"),
        (b'{"choices": [{"message": {"content": 5}}]}', "no chat completion"),
        (b"\xff\xfe\x00garbage\x1b[31m", "no chat completion"),
        (b"[" * 5000, "no chat completion"),
    ],
)
def test_malformed_replies_are_asked_again_and_then_given_up_with_the_reason(
    tmp_path, data, reason
):
    with serve(Reply(data=data)) as server:
        (answer,), _ = ask(settings(server, attempts=3), tmp_path)
        assert len(server.requests) == 3
    assert isinstance(answer, Unanswered)
    assert reason in str(answer) and str(answer).endswith("3 times")
    assert str(answer).isprintable()


def test_a_silent_server_times_out_and_the_row_is_given_up(tmp_path):
    with serve(Reply(silent=True)) as server:
        (answer,), _ = ask(settings(server, timeout=0.2, attempts=2), tmp_path)
        assert len(server.requests) == 2
    assert str(answer) == "no reply within 0.2 s, 2 times"


def test_a_reply_over_the_size_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "_LARGEST", 1 << 20)
    with serve(says("x" * (2 << 20))) as server:
        (answer,), _ = ask(settings(server), tmp_path)
    assert str(answer) == "the reply is over 1 MiB"


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
        (answer,), _ = ask(settings(server), tmp_path)
    assert answer.text == text


def test_a_content_filter_is_the_judges_refusal(tmp_path):
    filtered = Reply(400, data=b'{"error": {"code": "content_filter", "message": "blocked"}}')
    with serve(filtered) as server:
        answers, _ = ask(settings(server), tmp_path, count=20)
    assert answers == [Answer(text="", finish="content_filter")] * 20


def test_a_bad_request_is_not_repeated(tmp_path):
    with serve(Reply(400, data=b"context length exceeded")) as server:
        (answer,), _ = ask(settings(server), tmp_path)
        assert len(server.requests) == 1
    assert str(answer) == "HTTP 400 (context length exceeded)"


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "refuses the key"), (403, "refuses the key"), (404, "is not there"), (302, "not there")],
)
def test_what_no_row_can_get_past_stops_the_run(tmp_path, status, message):
    with serve(Reply(status, {"Location": "http://127.0.0.1:9/"})) as server:
        (answer,), _ = ask(settings(server), tmp_path)
        assert len(server.requests) == 1
    assert isinstance(answer, UserError) and message in str(answer)


def test_a_server_that_fails_many_rows_in_a_row_stops_the_run(tmp_path):
    with serve(Reply(422, data=b"unknown model")) as server:
        answers, _ = ask(settings(server, concurrency=1), tmp_path, count=endpoint.GIVE_UP)
    assert sum(isinstance(answer, UserError) for answer in answers) == 1
    assert any("8 rows in a row got no reply" in str(answer) for answer in answers)


def test_nobody_at_the_address_stops_the_run(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = Endpoint(base_url=f"http://127.0.0.1:{free.getsockname()[1]}/v1", model="m")
        answers, _ = ask(where, tmp_path, count=endpoint.GIVE_UP)
    assert any(isinstance(a, UserError) and "ConnectError" in str(a) for a in answers)


def test_a_wait_too_long_to_sit_out_stops_the_run(tmp_path):
    with serve(Reply(429, {"Retry-After": "3600"}, b"daily quota")) as server:
        (answer,), clock = ask(settings(server), tmp_path)
    assert isinstance(answer, UserError)
    assert "asks to wait 3600 s" in str(answer) and clock.slept == []


def test_as_many_calls_are_in_flight_as_allowed_and_no_more(tmp_path):
    from jaxsteer.judges import rubric, run
    from jaxsteer.judges.verdicts import Item

    items = [Item(row_id=f"r{i}", family="benign", prompt="p", response=f"{i}") for i in range(24)]
    kept: list = []
    # Each call waits until three are there, so it takes three in flight to get on.
    together = threading.Barrier(3, timeout=30)

    def script(body, n):
        together.wait()
        return says("coherence: 80")

    with serve(script) as server:
        client = Client(settings(server, concurrency=3), cache=tmp_path)
        asyncio.run(run.ask_all(rubric.coherence(), client, items, kept.extend))
    assert len(kept) == 24 and server.at_once == 3


def test_calls_are_spaced_by_the_rate(tmp_path):
    with serve(says("fine")) as server:
        _, clock = ask(settings(server, rate=30.0), tmp_path, count=4)
    assert max(clock.slept) <= 6.0 and clock.now >= 106.0


def test_the_key_comes_from_the_environment_and_is_shown_to_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    with serve(Reply(401, data=b"wrong key sk-secret-123")) as server:
        (answer,), _ = ask(settings(server, key_variable="MY_KEY"), tmp_path)
        assert server.headers[0]["authorization"] == "Bearer sk-secret-123"
    assert "sk-secret" not in str(answer) and "[key]" in str(answer)


def test_without_a_key_none_is_sent(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXSTEER_JUDGE_KEY", raising=False)
    with serve(says("fine")) as server:
        ask(settings(server), tmp_path)
    assert "authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_url": "localhost:8000"}, "is no address"),
        ({"base_url": "file:///etc/passwd"}, "is no address"),
        ({"base_url": "http://[::1"}, "is no address"),
        ({"base_url": "http://127.0.0.1:99999/v1"}, "is no address"),
        ({"base_url": "http://x\n/v1"}, "is no address"),
        ({"base_url": "http://\udcff/v1"}, "is no address"),
        ({"base_url": "http://a b/v1"}, "is no address"),
        ({"model": "m\udcff"}, "give it in UTF-8"),
        ({"base_url": "http://me:pw@host/v1"}, "may not hold a password"),
        ({"base_url": "http://host/v1?key=1"}, "may not hold a password"),
        ({"omit": ("messages",)}, "can be left out"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_sent(change, message):
    good = Endpoint(base_url="http://127.0.0.1:9/v1", model="m")
    with pytest.raises(UserError, match=message):
        endpoint.check(dataclasses.replace(good, **change))


def test_an_address_that_only_the_http_library_knows_to_be_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no address"):
        Client(Endpoint(base_url=f"http://{'ü' * 70}/v1", model="m"), cache=tmp_path)


def test_a_key_with_a_line_break_is_refused(monkeypatch):
    monkeypatch.setenv("JAXSTEER_JUDGE_KEY", "sk\nX-Evil: 1")
    with pytest.raises(UserError, match="control characters"):
        endpoint.check(Endpoint(base_url="http://127.0.0.1:9/v1", model="m"))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("1.5", 1.5),
        ("-3", 0.0),
        ("soon", None),
        ("inf", None),
        ("nan", None),
        (f"Mon, 01 Jan {'9' * 20} 00:00:00 GMT", None),
    ],
)
def test_retry_after_in_other_forms(value, seconds):
    assert retry_after({"retry-after": value}) == seconds
