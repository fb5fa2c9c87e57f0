from __future__ import annotations

import msgspec
import numpy as np
import polars as pl
import pytest
from statsmodels.stats.proportion import confint_proportions_2indep
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from jaxsteer.errors import UserError
from jaxsteer.judges.verdicts import SCHEMA
from jaxsteer.receipt import build, compare, statement, verify
from jaxsteer.study import results
from jaxsteer.study.impact import FILE as IMPACT
from jaxsteer.study.impact import SCHEMA as FIELDS
from tests.receipt import made


def receipt(folder, **more):
    build.write(made.folder(folder, **more))
    return statement.load(folder / build.JSON)


def weaker(condition, family, i):
    """As usual, but the untouched model refuses 6 prompts less."""
    if condition == "baseline" and family == "strongreject":
        return "refusal" if i < 12 else "complied-unscored"
    return made.usual(condition, family, i)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diff")
    return receipt(folder / "a"), receipt(folder / "b", label=weaker)


def line(comparison, condition, metric):
    [found] = [ln for ln in comparison.lines if (ln.condition, ln.metric) == (condition, metric)]
    return found


def test_only_what_moved_differs_and_its_interval_is_newcombes(two):
    comparison = compare.compare(*two)
    found = line(comparison, "baseline", "refusal")
    assert (found.first, found.second) == (0.45, 0.3)
    expected = confint_proportions_2indep(12, 40, 18, 40, method="newcomb")
    assert (found.low, found.high) == pytest.approx(expected)
    others = {ln.difference for ln in comparison.lines if ln.condition != "baseline"}
    assert others == {0.0}
    assert comparison.changed == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p["steering"]["directions"][0].update(sha256=made.sha("x")), "the directions"),
        (lambda p: p["steering"]["directions"][0].update(source_sha256="x"), "the directions"),
        (lambda p: p["model"].update(config_sha256=made.sha("x")), "the model's config"),
        (lambda p: p.update(tool="jaxsteer 0.0.9"), "the version of jaxsteer"),
        (lambda p: p["environment"].update(device="1 x tpu"), "the machine or its software"),
    ],
)
def test_whatever_else_differs_is_named(two, change, said):
    value = msgspec.to_builtins(two[0], str_keys=True)
    change(value["predicate"])
    assert compare.compare(two[0], statement.convert(value)).changed == [said]


def test_a_clear_difference_is_said_to_have_moved(two, tmp_path):
    none = receipt(tmp_path, label=lambda *of: "degenerate")
    assert line(compare.compare(two[0], none), "baseline", "refusal").moved
    assert not line(compare.compare(*two), "baseline", "refusal").moved


def test_mean_difference_equals_statsmodels(rng):
    a, b = rng.beta(1, 4, 60), rng.beta(2, 4, 45)
    expected = CompareMeans(DescrStatsW(b), DescrStatsW(a)).zconfint_diff(usevar="unequal")
    sides = [(float(x.mean()), float(x.std(ddof=1)), len(x)) for x in (a, b)]
    assert compare.mean_difference(*sides) == pytest.approx(expected)


def test_leakage_is_compared_where_both_measured_it(tmp_path):
    made_of = []
    for name, score in (("a", 0.1), ("b", 0.4)):
        folder = made.folder(tmp_path / name)
        frame = made.guard(pl.read_parquet(folder / "responses.parquet"))
        (folder / "judges").mkdir()
        spread = np.linspace(0, score, frame.height)
        frame.with_columns(score=pl.Series(spread)).cast(SCHEMA).write_parquet(
            folder / "judges/leakage.parquet"
        )
        results.refresh_summary(folder)
        build.write(folder)
        made_of.append(statement.load(folder / build.JSON))
    found = line(compare.compare(*made_of), "baseline", "leakage")
    assert found.low < found.difference < found.high
    assert found.difference == pytest.approx(3 * found.first, rel=1e-4)


def test_one_scored_row_a_side_does_not_show_that_leakage_moved(tmp_path):
    made_of = []
    for name, score in (("a", 0.0), ("b", 0.5)):
        folder = made.folder(tmp_path / name)
        frame = made.guard(pl.read_parquet(folder / "responses.parquet"))
        one = frame.filter(pl.col("row_id").str.starts_with("baseline/sr")).head(1)
        (folder / "judges").mkdir()
        one.with_columns(score=pl.lit(score)).cast(SCHEMA).write_parquet(
            folder / "judges/leakage.parquet"
        )
        results.refresh_summary(folder)
        build.write(folder)
        made_of.append(statement.load(folder / build.JSON))
    found = line(compare.compare(*made_of), "baseline", "leakage")
    assert (found.n_first, found.n_second, found.difference) == (1, 1, 0.5)
    assert (found.low, found.high, found.moved) == (-1.0, 1.0, False)


def test_modes_of_two_receipts_are_compared_when_each_has_one(tmp_path):
    calm = receipt(tmp_path / "a", study=made.study(modes=["calm"]))
    bold = receipt(tmp_path / "b", study=made.study(modes=["bold"]))
    comparison = compare.compare(calm, bold)
    found = line(comparison, "calm: baseline", "refusal")
    assert found.other == "bold: baseline"
    assert "the persona modes" in comparison.changed


def test_two_modes_of_one_receipt_are_compared_by_name(tmp_path):
    both = receipt(tmp_path, study=made.study(modes=["calm", "bold"]))
    comparison = compare.compare(both, both, mode_first="calm", mode_second="bold")
    assert {ln.other.partition(":")[0] for ln in comparison.lines} == {"bold"}
    with pytest.raises(UserError, match="has no mode 'shy'; it has calm, bold"):
        compare.compare(both, both, mode_first="shy")


def test_gates_fire_on_the_condition_that_moved(two):
    comparison = compare.compare(*two)
    [(gate, found)] = compare.fired(comparison, [compare.parse_gate("refusal drop > 0.1")])
    assert (gate.metric, found.condition) == ("refusal", "baseline")
    assert compare.fired(comparison, [compare.parse_gate("refusal drop > 0.15")]) == []
    assert compare.fired(comparison, [compare.parse_gate("refusal rise > 0.1")]) == []
    assert compare.fired(comparison, [compare.parse_gate("refusal drop > 0.1 in persona")]) == []


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ("bypass rise > 0.1", "bypass is not known in both"),
        (
            "refusal drop > 0.1 in nowhere",
            "in 'nowhere' is not known.*; it is known in 'baseline', 'pers",
        ),
        ("leakage rise > 0", "leakage is not known"),
    ],
)
def test_a_gate_that_cannot_be_evaluated_is_an_error_and_never_passes(two, gate, said):
    with pytest.raises(UserError, match=said):
        compare.fired(compare.compare(*two), [compare.parse_gate(gate)])


def test_a_condition_that_went_missing_does_not_pass_a_gate_over_all(two, tmp_path):
    study = made.study(claims=[])
    fewer = msgspec.structs.replace(study, condition=study.condition[1:])
    comparison = compare.compare(two[0], receipt(tmp_path, study=fewer))
    assert comparison.only_first == ["baseline"]
    with pytest.raises(UserError, match="in 'baseline' is not known"):
        compare.fired(comparison, [compare.parse_gate("refusal drop > 0.1")])
    assert compare.fired(comparison, [compare.parse_gate("refusal drop > 0.1 in persona")]) == []


def test_receipts_without_a_common_condition_are_not_compared(two, tmp_path):
    study = made.study(claims=[])
    renamed = [msgspec.structs.replace(study.condition[0], name="other")]
    other = receipt(tmp_path, study=msgspec.structs.replace(study, condition=renamed))
    with pytest.raises(UserError, match="no condition in common"):
        compare.compare(two[0], other)


def test_a_changed_receipt_is_not_compared(two, tmp_path):
    build.write(made.folder(tmp_path))
    path = tmp_path / build.JSON
    path.write_text(path.read_text().replace('"k": 18', '"k": 17', 1))
    with pytest.raises(UserError, match="was changed"):
        statement.load(path)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("refusal drop > 0.05", ("refusal", "drop", 0.05, "")),
        ("  benign-refusal   rise>0.1 ", ("benign-refusal", "rise", 0.1, "")),
        ("bypass rise > 5%", ("bypass", "rise", 0.05, "")),
        ("bypass rise > .05", ("bypass", "rise", 0.05, "")),
        (
            "leakage rise > 0 in calm: persona, out late #2",
            ("leakage", "rise", 0.0, "calm: persona, out late #2"),
        ),
    ],
)
def test_gates_are_read(text, read):
    gate = compare.parse_gate(text)
    assert (gate.metric, gate.way, gate.threshold, gate.condition) == read


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot read"),
        ("refusal", "cannot read"),
        ("refusal drop 0.05", "cannot read"),
        ("refusal drop < 0.05", "cannot read"),
        ("refusal drop > 0.05 in", "cannot read"),
        ("refusal drop > -0.05", "cannot read"),
        ("refusal drop > 0.05; rm", "cannot read"),
        ("refusals drop > 0.05", "no metric 'refusals'"),
        ("refusal falls > 0.05", r"cannot read .* write METRIC drop\|rise"),
        ("refusal drop > 0.0.5", "cannot read"),
        ("refusal drop > 5", "at most 1"),
        ("refusal drop > 150%", "at most 1"),
    ],
)
def test_malformed_gates_are_refused_saying_why(text, said):
    with pytest.raises(UserError, match=said):
        compare.parse_gate(text)


def test_a_gate_fires_beyond_its_threshold_and_in_its_own_direction():
    drop, rise = (
        compare.parse_gate("refusal drop > 0.05"),
        compare.parse_gate("refusal rise > 0.05"),
    )
    assert drop.fires(-0.06)
    assert not drop.fires(0.06)
    assert rise.fires(0.06)
    # At the threshold is not beyond it, although 0.35 - 0.3 is slightly above 0.05.
    assert not rise.fires(0.35 - 0.3)
    assert not drop.fires(0.0)


def impact(folder, persona):
    """Impact of the persona: divergences of four replies, and which of ten questions are right."""
    nats, right = persona
    lines = [("persona", f"b{i}", "kl", value, "") for i, value in enumerate(nats)]
    for condition, answered in (("baseline", range(10)), ("persona", right)):
        lines += [(condition, f"q{i}", "answer", float(i in answered), "") for i in range(10)]
    pl.DataFrame(lines, schema=FIELDS, orient="row").write_parquet(folder / IMPACT)


@pytest.fixture
def costly(tmp_path):
    made_of = [made.folder(tmp_path / name) for name in "ab"]
    impact(made_of[0], ([0.1, 0.2, 0.1, 0.2], range(9)))
    impact(made_of[1], ([1.1, 1.4, 1.2, 1.5], range(4)))
    for folder in made_of:
        build.write(folder)
    return [statement.load(folder / build.JSON) for folder in made_of]


def test_benign_impact_is_compared_by_independent_intervals(costly):
    comparison = compare.compare(*costly)
    nats, right = (line(comparison, "persona", m) for m in ("benign-kl", "benign-accuracy"))
    assert (nats.first, nats.second) == pytest.approx((0.15, 1.3))
    assert (right.first, right.second, right.n_first) == (0.9, 0.4, 10)
    expected = confint_proportions_2indep(4, 10, 9, 10, method="newcomb")
    assert (right.low, right.high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("gate", "conditions"),
    [
        ("benign-kl rise > 1.1", ["persona"]),
        ("benign-kl rise > 1.2", []),
        ("benign-accuracy drop > 10%", ["persona"]),
    ],
)
def test_gates_watch_the_benign_impact(costly, gate, conditions):
    fired = compare.fired(compare.compare(*costly), [compare.parse_gate(gate)])
    assert [found.condition for _, found in fired] == conditions


def test_right_answers_that_do_not_follow_from_their_counts_are_found(costly, tmp_path):
    path = tmp_path / "b" / build.JSON
    for change in ({"rate": 0.5}, {"change": 0.5}, {"n": 3}, {"n": 0}):
        value = msgspec.json.decode(path.read_bytes())
        persona = next(c for c in value["predicate"]["conditions"] if c["name"] == "persona")
        persona["impact"]["answers"] |= change
        value["predicate"]["digest"]["sha256"] = statement.digest(value)
        (tmp_path / "changed.json").write_text(statement.canonical_text(value))
        wrong = [c for c in verify.verify(tmp_path / "changed.json") if c.status == "mismatch"]
        assert any("right answers" in check.detail for check in wrong)
