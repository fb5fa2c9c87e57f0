from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from statsmodels.stats.inter_rater import cohens_kappa

from jaxsteer.judges.human import agreements
from tests.judges.test_verdicts_labels import responses, table


def study(n: int, rng: np.random.Generator):
    """n rows, and verdicts of every judge that agree with chance and a little more."""
    texts = {f"r{i}": f"Reply number {i}." for i in range(n)}
    truth = rng.random(n) < 0.4

    def noisy() -> list[bool]:
        return list(np.where(rng.random(n) < 0.8, truth, rng.random(n) < 0.5))

    def lines(words: tuple[str, str], scores: tuple[float, float], said: list[bool]):
        return [
            (row_id, text, scores[int(yes)], words[int(yes)])
            for (row_id, text), yes in zip(texts.items(), said, strict=True)
        ]

    said = {judge: noisy() for judge in ("keyword", "llama-guard", "rubric", "coherence", "human")}
    verdicts = {
        "keyword": table("keyword-3", lines(("other", "refusal"), (0, 1), said["keyword"])),
        "llama-guard": table(
            "g-1", lines(("harmless", "harmful"), (0.1, 0.9), said["llama-guard"])
        ),
        "strongreject-rubric": table(
            "s-1", lines(("refusal", "harmful"), (0.0, 0.8), said["rubric"])
        ),
        "coherence": table("c-1", lines(("coherent", "incoherent"), (90, 10), said["coherence"])),
        "human": table("human-1", lines(("benign-answer", "bypass"), (0, 1), said["human"])),
    }
    return responses(texts), verdicts, said


def test_kappa_and_counts_are_statsmodels(rng):
    rows, verdicts, said = study(300, rng)
    found = {(a.question, a.first, a.second): a for a in agreements(rows, verdicts)}
    pair = found["harmful", "llama-guard", "strongreject-rubric"]
    first, second = np.array(said["llama-guard"]), np.array(said["rubric"])
    confusion = np.array(
        [[(first & second).sum(), (first & ~second).sum()],
         [(~first & second).sum(), (~first & ~second).sum()]]
    )  # fmt: skip
    found = [pair.both_yes, pair.only_first, pair.only_second, pair.both_no]
    assert found == confusion.ravel().tolist()
    assert pair.n == 300
    assert pair.kappa == pytest.approx(cohens_kappa(confusion).kappa)


def test_every_pair_that_shares_a_question_is_compared(rng):
    rows, verdicts, _ = study(40, rng)
    pairs = {(a.question, a.first, a.second) for a in agreements(rows, verdicts)}
    assert pairs == {
        ("refusal", "keyword", "strongreject-rubric"),
        ("refusal", "keyword", "human"),
        ("refusal", "strongreject-rubric", "human"),
        ("harmful", "llama-guard", "strongreject-rubric"),
        ("harmful", "strongreject-rubric", "human"),
        ("harmful", "llama-guard", "human"),
        ("incoherent", "degenerate", "coherence"),
        ("incoherent", "degenerate", "human"),
        ("incoherent", "coherence", "human"),
    }


def test_only_rows_that_both_scored_count(rng):
    rows, verdicts, _ = study(40, rng)
    half = (
        verdicts["llama-guard"]
        .head(25)
        .with_columns(verdict=pl.when(pl.int_range(25) < 5).then(None).otherwise("verdict"))
    )
    found = agreements(rows, {**verdicts, "llama-guard": half})
    assert {a.n for a in found if "llama-guard" in (a.first, a.second)} == {20}


def test_a_persons_refusal_says_nothing_of_coherence():
    rows = responses({"a": "Boil it.", "b": "Fry it.", "c": "Bake it."})
    words = [("a", "Boil it.", None, "refusal"), ("b", "Fry it.", None, "degenerate")]
    found = agreements(rows, {"human": table("human-1", words)})
    (pair,) = [a for a in found if a.question == "incoherent"]
    assert (pair.n, pair.only_second, pair.both_yes, pair.both_no) == (1, 1, 0, 0)


def test_judges_that_always_say_the_same_have_no_kappa():
    rows = responses({"a": "Boil it.", "b": "Fry it."})
    words = [("a", "Boil it.", None, "bypass"), ("b", "Fry it.", None, "bypass")]
    scores = [("a", "Boil it.", 0.9, "harmful"), ("b", "Fry it.", 0.9, "harmful")]
    found = agreements(
        rows, {"human": table("human-1", words), "llama-guard": table("g-1", scores)}
    )
    (pair,) = [a for a in found if a.question == "harmful"]
    assert pair.both_yes == pair.n == 2 and pair.kappa is None


def test_judges_without_shared_rows_are_not_listed():
    rows = responses({"a": "Boil it.", "b": "Fry it."})
    found = agreements(
        rows,
        {
            "llama-guard": table("g-1", [("a", "Boil it.", 0.9, "harmful")]),
            "strongreject-rubric": table("s-1", [("b", "Fry it.", 0.9, "harmful")]),
        },
    )
    assert [a for a in found if a.question == "harmful"] == []
