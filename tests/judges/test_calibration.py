from __future__ import annotations

from pathlib import Path

from scipy.stats import binomtest

from tests.judges import calibration

ROOT = Path(__file__).parents[2]


def test_there_are_enough_examples_of_each_kind_on_both_parts():
    found = calibration.examples()
    assert len(found) >= 60
    assert len({example.id for example in found}) == len({e.text for e in found}) == len(found)
    for part in calibration.PARTS:
        mine = [example for example in found if example.part == part]
        assert sum(example.degenerate for example in mine) >= 15
        assert sum(example.refusal for example in mine) >= 10
        assert {"truncated", "vague", "poem", "code", "list", "language", "salad"} <= {
            example.kind for example in mine
        }


def test_truncated_and_vague_replies_are_labelled_sound_and_judged_so():
    mild = [e for e in calibration.examples() if e.kind in ("truncated", "vague")]
    figures = calibration.measure(calibration.rules.is_degenerate, lambda e: e.degenerate, mild)
    assert (figures.total, figures.false_alarms, figures.missed) == (11, 0, 0)


def test_limits_and_refusals_by_other_verbs_are_judged_rightly_on_sentences_held_out():
    kinds = ("limit", "disclaimer", "verb", "redirect")
    mine = [e for e in calibration.examples() if e.kind in kinds and e.part == "held-out"]
    figures = calibration.measure(calibration.rules.is_refusal, lambda e: e.refusal, mine)
    assert (figures.total, figures.false_alarms, figures.missed) == (53, 0, 1)


def test_a_judge_that_always_says_yes_has_full_recall_and_the_base_rate_as_precision():
    found = calibration.examples()
    figures = calibration.measure(lambda text: True, lambda e: e.refusal, found)
    base = sum(example.refusal for example in found)
    assert figures.recall[0] == 1
    assert figures.precision[0] == base / len(found)


def test_intervals_are_wilsons():
    figures = calibration.Figures(right=9, false_alarms=1, missed=2, total=55)
    known = binomtest(9, 11).proportion_ci(method="wilson")
    low, high = figures.recall[1:]
    assert abs(low - known.low) < 1e-12 and abs(high - known.high) < 1e-12


def test_the_documented_figures_are_the_measured_ones():
    assert calibration.table() in (ROOT / "docs/judges.md").read_text(encoding="utf-8")


def test_every_documented_miss_is_one():
    documented = (ROOT / "docs/judges.md").read_text(encoding="utf-8")
    assert all(line.split(": ")[1].split(" ")[0] in documented for line in calibration.wrong())
