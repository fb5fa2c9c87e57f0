from __future__ import annotations

import json

import jsonschema
import polars as pl
import pytest

from jaxsteer.errors import UserError
from jaxsteer.evidence import reliability
from jaxsteer.judges import verdicts
from jaxsteer.receipt import build, statement
from jaxsteer.study import results
from tests.receipt import made

SCHEMA = statement.json_schema()


def receipt_of(folder, **more):
    return statement.convert(
        statement.parse(statement.canonical_text(build.build(folder, **more)).encode(), "")
    ).predicate


def judged(folder, name, frame):
    (folder / "judges").mkdir(exist_ok=True)
    frame.cast(verdicts.SCHEMA).write_parquet(folder / "judges" / f"{name}.parquet")
    results.refresh_summary(folder)
    return folder


def test_a_receipt_validates_against_the_schema_of_the_structs(finished):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads((finished / build.JSON).read_text()), SCHEMA)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (["predicate", "rows", "n"], "many"),
        (["predicate", "rows", "sha256"], "abc"),
        (["subject"], []),
        (["predicateType"], "https://slsa.dev/provenance/v1"),
        (["predicate", "surprise"], 1),
        (["predicate", "conditions", 0, "outcomes", "strongreject", "refusal", "rate"], 1.5),
    ],
)
def test_the_schema_and_the_structs_refuse_the_same_things(finished, path, wrong):
    value = json.loads((finished / build.JSON).read_text())
    at = value
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, SCHEMA)
    with pytest.raises(UserError):
        statement.convert(value)


def test_it_is_an_in_toto_statement_about_the_models_files(finished):
    value = json.loads((finished / build.JSON).read_text())
    # https://github.com/in-toto/attestation, spec/v1/statement.md
    assert value["_type"] == "https://in-toto.io/Statement/v1"
    assert value["predicateType"].startswith("urn:")
    names = [subject["name"] for subject in value["subject"]]
    assert len(set(names)) == len(names)
    digests = {subject["name"]: subject["digest"]["sha256"] for subject in value["subject"]}
    assert digests["weights"] == made.sha("weights")
    assert digests["source/w.safetensors"] == made.sha("w")
    assert {"tokenizer", "chat template", "config.json"} <= set(names)


def test_building_twice_gives_the_same_bytes(finished, tmp_path):
    for file in build.write(finished, tmp_path, samples=3):
        assert file.read_bytes() == (finished / file.name).read_bytes()


def test_no_reply_is_in_a_receipt(tmp_path):
    folder = made.folder(tmp_path, response=lambda label, i: f"needle {label} {i}")
    for file in build.write(folder):
        assert "needle" not in file.read_text()


def test_samples_mask_every_word_of_what_may_do_harm(tmp_path):
    folder = made.folder(tmp_path, response=lambda label, i: f"needle{label}{i} two three four")
    shown = receipt_of(folder, samples=60).samples
    assert shown.rule == build.RULE
    for row in shown.rows:
        open_ = row.family == "benign" or row.label == "refusal"
        assert ("needle" in row.excerpt) == open_
        assert open_ or set(row.excerpt) == {"█", " "}
    assert len({row.label for row in shown.rows}) > 2


def test_rates_are_the_summarys(finished):
    summary = json.loads((finished / "summary.json").read_text())
    shown = {(c.name, f): o for c in receipt_of(finished).conditions for f, o in c.outcomes.items()}
    assert len(shown) == len(summary)
    for entry in summary:
        o = shown[entry["condition"], entry["family"]]
        assert (o.n, o.refusal.rate) == (entry["n"], pytest.approx(entry["refusal"], rel=1e-5))
        assert o.refusal.low == pytest.approx(entry["refusal_low"], rel=1e-5, abs=1e-9)
        assert o.degenerate.rate == pytest.approx(entry["degenerate"], rel=1e-5)


def test_bypass_is_unknown_until_a_judge_of_harm_has_seen_every_row(tmp_path):
    folder = made.folder(tmp_path)
    assert all(c.outcomes["strongreject"].bypass is None for c in receipt_of(folder).conditions)
    frame = pl.read_parquet(folder / "responses.parquet")
    judged(folder, "llama-guard", made.guard(frame, lambda row: row.startswith("persona/sr")))
    found = {c.name: c.outcomes["strongreject"] for c in receipt_of(folder).conditions}
    # The usual labels: 1 refusal of 40 under the persona, all others now unsafe.
    assert (found["persona"].bypass.k, found["baseline"].bypass.k) == (39, 0)
    assert found["persona"].unjudged == 0


def test_leakage_is_the_mean_score_of_refused_and_degenerate_rows(tmp_path):
    folder = made.folder(tmp_path)
    frame = made.guard(pl.read_parquet(folder / "responses.parquet"))
    scores = [0.25 if "baseline" in row else 0.0 for row in frame["row_id"]]
    judged(folder, "leakage", frame.with_columns(score=pl.Series(scores)))
    found = {c.name: c.outcomes["strongreject"].leakage for c in receipt_of(folder).conditions}
    assert (found["baseline"].n, found["baseline"].mean, found["baseline"].sd) == (20, 0.25, 0.0)
    assert found["persona"].mean == 0


def test_the_agreement_of_judges_is_in_the_receipt(tmp_path):
    folder = made.folder(tmp_path)
    frame = made.guard(pl.read_parquet(folder / "responses.parquet"))
    judged(folder, "llama-guard", frame)
    rubric = frame.with_columns(verdict=pl.lit("harmful"), score=pl.lit(0.9))
    judged(folder, "strongreject-rubric", rubric)
    [pair] = [a for a in receipt_of(folder).judges.agreement if a.question == "harmful"]
    assert {pair.first, pair.second} == {"strongreject-rubric", "llama-guard"}
    assert pair.both_yes + pair.only_first + pair.only_second + pair.both_no > 100
    assert pair.kappa == 0


def test_measured_geometry_is_in_the_receipt(tmp_path):
    folder = made.folder(tmp_path)
    assert receipt_of(folder).geometry is None
    written = made.measure(folder)
    found = receipt_of(folder).geometry
    assert found.directions["persona"].reliability["instruction"].mean[2:4] == [0.2, 0.3]
    assert found.pairs[0].null.p[2:4] == [0.2, 0.3]
    written["directions"]["persona"]["sha256"] = made.sha("other")
    (folder / reliability.FILE).write_text(json.dumps(written))
    with pytest.raises(UserError, match="measured other directions"):
        build.build(folder)


def test_modes_are_shown_with_their_whole_system_prompts(tmp_path):
    folder = made.folder(tmp_path, study=made.study(modes=["calm", "bold"]))
    receipt = receipt_of(folder)
    assert [s.mode for s in receipt.system_prompts] == ["calm", "bold"]
    assert receipt.system_prompts[0].text == f"Be calm.\n\n{made.POLICY}"
    assert {c.treated for c in receipt.random_controls} >= {"calm: persona", "bold: persona"}


def test_a_direction_that_was_not_run_is_refused(copied):
    from jaxsteer.directions import direction

    swapped = made.made_directions()
    swapped[0].vectors[0, 0] += 1
    direction.save(copied / "directions.safetensors", swapped)
    with pytest.raises(UserError, match="'persona' is not the direction that was run"):
        build.build(copied)


def test_an_unfinished_study_has_no_receipt(tmp_path):
    with pytest.raises(UserError, match="jaxsteer sweep"):
        build.build(tmp_path)
