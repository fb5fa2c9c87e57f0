"""Studies end to end on a tiny random model: rows, resume, refusals to mix runs, the table."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import polars as pl
import pytest

from jaxsteer import files
from jaxsteer.data import prompts as data
from jaxsteer.errors import UserError
from jaxsteer.generation import engine as rows
from jaxsteer.generation.distributed import Hosts
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.study import prepare, results, run, spec
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return ChatModel.load(
        convert(tiny.save(tiny.llama(), folder / "hf"), folder / "out", "float32")
    )


@pytest.fixture
def study(tmp_path):
    return tiny.study(tmp_path)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run.run_study(spec.load(tiny.study_file(folder)), model, folder / "results")
    return folder / "results"


def test_every_planned_row_is_in_the_table_once(finished):
    loaded = results.load(finished)
    assert loaded.rows["row_id"].n_unique() == loaded.rows.height
    counts = dict(loaded.rows.group_by("condition").len().iter_rows())
    # 6 harmful prompts each; the benign ones run where the spec says so.
    assert counts == {
        "baseline": 9,
        "persona": 9,
        "persona, out": 6,
        "random #1": 6,
        "random #2": 6,
        "persona, out, unsteered": 6,
    }
    assert set(results.SCHEMA) <= set(loaded.rows.columns)


def test_a_condition_may_run_on_the_first_prompts_only(model, tmp_path):
    cut = ("random_seeds = [1, 2]", "random_seeds = [1, 2]\nprompts = 2")
    run.run_study(spec.load(tiny.study_file(tmp_path, cut)), model, tmp_path / "results")
    table = results.load(tmp_path / "results").rows
    by_name = {name: rows["prompt_id"].to_list() for (name,), rows in table.group_by("condition")}
    for seed in (1, 2):
        assert by_name[f"random #{seed}"] == by_name["persona, out"][:2]


def test_a_studys_only_probe_is_not_read_alone(model, study, tmp_path, monkeypatch):
    asked, plain = [], rows.run

    def watched(*of, probes, **options):
        asked.append(probes)
        return plain(*of, probes=probes, **options)

    prepare.prepare(study, model, tmp_path / "results")
    monkeypatch.setattr(rows, "run", watched)
    run.run_study(study, model, tmp_path / "results")
    # The persona's, and one of zeros beside it: see `test_rows`.
    (probes,) = asked
    assert probes.shape[1] == 2 and probes[:, 0].any() and not probes[:, 1].any()
    columns = results.load(tmp_path / "results").rows.columns
    assert [name for name in columns if name.endswith("_after_prompt")] == ["persona_after_prompt"]


def test_the_summary_has_the_promised_keys(finished):
    for entry in results.summarise(results.load(finished).rows):
        promised = {"condition", "family", "n", "refusal", "refusal_low", "refusal_high"}
        assert promised | {"degenerate", "complied", "cancels_steering"} <= set(entry)


def test_realised_changes_are_recorded_and_zero_only_where_nothing_was_asked(finished):
    change = dict(
        results.load(finished).rows.group_by("condition").agg(pl.col("change").min()).iter_rows()
    )
    assert change.pop("baseline") == 0
    assert all(value > 0 for value in change.values())


def test_a_projection_leaves_no_persona_at_its_layer(finished):
    rows = results.load(finished).rows.filter(pl.col("condition") == "persona, out")
    for before, after in rows.select("persona_before_prompt", "persona_after_prompt").iter_rows():
        assert abs(after[2]) < 1e-4 < abs(before[2])


def test_an_interrupted_run_continues_to_the_same_table(model, study, tmp_path, finished):
    out = tmp_path / "results"
    written = []
    write = results.write_shard

    class Stop(Exception):
        pass

    def stop_after_three(*args):
        write(*args)
        written.append(args)
        if len(written) == 3:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "write_shard", stop_after_three)
        with pytest.raises(Stop):
            run.run_study(study, model, out)
    with pytest.raises(UserError, match="unfinished"):
        results.load(out)
    run.run_study(study, model, out)
    assert results.load(out).rows.equals(results.load(finished).rows)


def test_the_finished_rows_of_a_stopped_run_are_kept(model, tmp_path):
    # Fewer than a shard's worth.
    study = spec.load(tiny.study_file(tmp_path, ("batch = 4", "batch = 64")))
    prepare.prepare(study, model, tmp_path / "results")
    ended, go = [], rows.run

    def stopped_after_the_first(*args, **kwargs):
        first = next(go(*args, **kwargs))[:3]
        ended.extend(first)
        yield first
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "run", stopped_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            run.run_study(study, model, tmp_path / "results")
    (shard,) = (tmp_path / "results/shards").glob("*.parquet")
    assert pl.read_parquet(shard)["response"].to_list() == [reply.text for reply in ended]


def test_an_error_raised_while_rows_are_closed_reaches_the_caller(model, tmp_path, monkeypatch):
    """A generator that is forgotten, not closed, would swallow it."""
    study = spec.load(tiny.study_file(tmp_path, ("batch = 4", "batch = 1")))
    prepare.prepare(study, model, tmp_path / "results")
    go = rows.run

    class Stopped(BaseException):
        pass

    def stopped_at_its_end(*args, **kwargs):
        try:
            yield from go(*args, **kwargs)
        finally:
            raise Stopped

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(rows, "run", stopped_at_its_end)
    monkeypatch.setattr(results, "write_shard", full)
    with pytest.raises(BaseException) as raised:
        run.run_study(study, model, tmp_path / "results")
    seen, found = raised.value, []
    while seen is not None:
        found.append(type(seen))
        seen = seen.__context__
    assert Stopped in found


def test_rows_are_written_in_time_however_few_have_ended(model, study, tmp_path, monkeypatch):
    prepare.prepare(study, model, tmp_path / "results")
    monkeypatch.setattr(run, "OFTEN", 0)
    batches, go = [], rows.run

    def watched(*args, **kwargs):
        for ended in go(*args, **kwargs):
            batches.append(len(ended))
            yield ended

    monkeypatch.setattr(rows, "run", watched)
    run.run_study(study, model, tmp_path / "results")
    assert len(list((tmp_path / "results/shards").glob("*.parquet"))) == len(batches) > 1


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("scale = 4.0", "scale = 5.0", "study"),
        ("n = 6", "n = 5", "study, prompts"),
        ("max_new_tokens = 6", "max_new_tokens = 7", "study"),
    ],
)
def test_a_changed_study_is_refused_naming_what_differs_and_fresh_replaces_it(
    model, tmp_path, old, new, named
):
    out = tmp_path / "results"
    run.run_study(spec.load(tiny.study_file(tmp_path)), model, out)
    changed = spec.load(tiny.study_file(tmp_path, (old, new)))
    before = (out / "responses.parquet").read_bytes()
    with pytest.raises(UserError, match=rf"another run \({named} differ\).*--fresh"):
        run.run_study(changed, model, out)
    assert (out / "responses.parquet").read_bytes() == before
    run.run_study(changed, model, out, fresh=True)
    assert results.load(out).run.study == changed


def test_a_trait_that_was_edited_after_the_run_is_refused_and_no_file_touched(model, tmp_path):
    text = (data.HERE / "traits/compliant.toml").read_text()
    trait = tmp_path / "mine.toml"
    trait.write_text(text)
    study = spec.load(tiny.study_file(tmp_path, ('"compliant"', f'"{trait}"')))
    out = tmp_path / "results"
    run.run_study(study, model, out)
    held = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    question = data.trait(str(trait)).questions[0]
    trait.write_text(text.replace(question, question + " Briefly."))
    with pytest.raises(UserError, match=r"another run \(study differ\).*--fresh"):
        run.run_study(spec.load(tmp_path / "tiny.toml"), model, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == held


def test_another_models_results_are_not_mixed_in(finished, tmp_path):
    other = convert(tiny.save(tiny.qwen2(), tmp_path / "hf"), tmp_path / "other", "float32")
    held = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"another run \(model differ\)"):
        run.run_study(spec.load(tiny.study_file(tmp_path)), ChatModel.load(other), finished)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == held


def test_a_second_process_is_kept_out(model, study, tmp_path):
    with files.locked(tmp_path / "results"), pytest.raises(UserError, match="in use"):
        run.run_study(study, model, tmp_path / "results")


def test_a_folder_of_something_else_is_kept(model, study, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("precious")
    with pytest.raises(UserError, match="is not a results folder"):
        run.run_study(study, model, tmp_path / "mine", fresh=True)
    assert (tmp_path / "mine/notes.txt").read_text() == "precious"


def test_fresh_replaces_what_an_interrupted_deletion_left(model, study, tmp_path):
    (tmp_path / "results/shards").mkdir(parents=True)
    (tmp_path / "results/directions.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="give --fresh"):
        run.run_study(study, model, tmp_path / "results")
    assert run.run_study(study, model, tmp_path / "results", fresh=True)


def test_a_file_of_something_else_among_a_runs_own_is_kept(model, study, tmp_path):
    (tmp_path / "mine/shards").mkdir(parents=True)
    (tmp_path / "mine/.DS_Store").touch()
    (tmp_path / "mine/notes.txt").write_text("precious")
    with pytest.raises(UserError, match="is not a results folder"):
        run.run_study(study, model, tmp_path / "mine", fresh=True)
    assert (tmp_path / "mine/notes.txt").read_text() == "precious"


def test_an_intervention_that_changes_nothing_is_an_error(model, tmp_path):
    empty = spec.load(tiny.study_file(tmp_path, ("scale = 4.0", "scale = 1e-30")))
    with pytest.raises(UserError, match=r"'random #1' \(add random-1.*changed nothing"):
        run.run_study(empty, model, tmp_path / "results")


@pytest.mark.parametrize("scale", ["1e30", "1e38", "3e38"])
def test_a_stream_that_overflows_is_an_error_of_its_own(model, tmp_path, scale):
    strong = spec.load(tiny.study_file(tmp_path, ("scale = 4.0", f"scale = {scale}")))
    out = tmp_path / "results"
    with pytest.raises(UserError, match=r"'random #[12]': the residual stream contains NaN"):
        run.run_study(strong, model, out)
    kept = [row for shard in (out / "shards").glob("*") for row in pl.read_parquet(shard)["change"]]
    assert all(map(math.isfinite, kept))


def test_weights_that_are_not_numbers_are_an_error(model, study, tmp_path):
    run.run_study(study, model, tmp_path / "results")
    broken = jax.tree.map(lambda leaf: leaf, model.params)
    scale = broken["layers"]["1"]["mlp_norm"]["scale"]
    broken["layers"]["1"]["mlp_norm"]["scale"] = scale.at[3].set(jnp.nan)
    for shard in (tmp_path / "results/shards").glob("*"):
        shard.unlink()
    with pytest.raises(UserError, match=r"if nothing is steered, convert the model again"):
        run.run_study(study, dataclasses.replace(model, params=broken), tmp_path / "results")


def test_a_damaged_shard_is_named_and_costs_only_its_rows(model, study, tmp_path, finished):
    out = tmp_path / "results"
    run.run_study(study, model, out)
    victim = sorted((out / "shards").glob("*.parquet"))[1]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    with pytest.raises(UserError, match=victim.name):
        run.run_study(study, model, out)
    victim.unlink()
    run.run_study(study, model, out)
    assert results.load(out).rows.equals(results.load(finished).rows)


# A process alone with another one's number: it waits for no other and has no rows.
SECOND = Hosts(process=1, count=1)


@pytest.fixture(scope="module")
def first(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    run.run_study(spec.load(tiny.study_file(folder)), model, folder / "results")
    return folder / "results"


def test_a_process_without_rows_leaves_the_results_alone(model, first, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    study = spec.load(tiny.study_file(tmp_path))
    assert run.run_study(study, model, first, hosts=SECOND) == []
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("scale = 4.0", "scale = 5.0"),
        ("dose = 3.0", "dose = 2.0"),
    ],
)
def test_a_process_asked_for_another_run_is_refused(model, first, tmp_path, old, new):
    other = spec.load(tiny.study_file(tmp_path, (old, new)))
    with pytest.raises(UserError, match=r"process 1 does not find in .* what process 0 prepared"):
        run.run_study(other, model, first, hosts=SECOND)
