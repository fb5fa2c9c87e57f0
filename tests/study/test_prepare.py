"""Setups on a tiny random model: what they choose, and how an interrupted one goes on."""

from __future__ import annotations

import pytest

from jaxsteer.directions import direction, extraction
from jaxsteer.errors import UserError
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.model.interventions import Add
from jaxsteer.study import prepare, results, run, selection, spec
from jaxsteer.study.selection import Rater
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepare")
    return ChatModel.load(
        convert(tiny.save(tiny.llama(), folder / "hf"), folder / "out", "float32")
    )


@pytest.fixture
def study(tmp_path):
    return tiny.study(tmp_path)


def test_a_setup_goes_on_where_it_stopped(model, study, tmp_path):
    out = tmp_path / "results"
    made = prepare.prepare(study, model, out)
    written = (out / "directions.safetensors").stat().st_mtime_ns
    again = prepare.prepare(study, model, out)
    assert (out / "directions.safetensors").stat().st_mtime_ns == written
    assert again.record == made.record and again.record.layers == {"steer": 1, "late": 2}


PERSONA = 'persona = { kind = "trait", trait = "compliant" }\n'
EVIL = 'evil = { kind = "trait", trait = "evil" }\n'


def stop_setup(study, model, out, after):
    """Set a study up and be stopped when that many directions are done."""
    saved, save = [], direction.save

    def stopping(*args):
        save(*args)
        saved.append(args)
        if len(saved) == after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direction, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(study, model, out)


@pytest.fixture
def stopped(model, tmp_path):
    """A study of two directions whose setup was stopped after the first, and its folder."""
    study = spec.load(tiny.study_file(tmp_path, (PERSONA, PERSONA + EVIL)))
    stop_setup(study, model, tmp_path / "results", after=1)
    return study, tmp_path / "results"


@pytest.fixture
def extracted(monkeypatch):
    """Names of the directions that are extracted from here on."""
    names, difference = [], extraction.difference

    def watched(model, name, *args, **kwargs):
        names.append(name)
        return difference(model, name, *args, **kwargs)

    monkeypatch.setattr(extraction, "difference", watched)
    return names


def test_a_setup_that_stopped_between_directions_goes_on_with_those_it_has(
    model, stopped, extracted
):
    study, out = stopped
    run.run_study(study, model, out)
    assert extracted == ["evil"]
    assert set(direction.load(out / "directions.safetensors")) >= {"persona", "evil"}


def test_a_setup_that_stopped_takes_random_norms_from_the_same_direction(model, tmp_path):
    # No persona, and the alphabet against the order of the study.
    two = 'zeal = { kind = "trait", trait = "arrogant" }\n' + EVIL
    changes = [(PERSONA, two)] + [('"persona", at', '"zeal", at')] * 3
    study = spec.load(tiny.study_file(tmp_path, *changes))
    whole = prepare.prepare(study, model, tmp_path / "whole")
    stop_setup(study, model, tmp_path / "stopped", after=2)
    assert prepare.prepare(study, model, tmp_path / "stopped").record == whole.record


def test_fresh_replaces_a_setup_that_stopped(model, stopped, extracted):
    study, out = stopped
    run.run_study(study, model, out, fresh=True)
    assert extracted == ["persona", "evil"]


def test_a_run_that_lost_its_setup_makes_it_again(model, study, tmp_path):
    out = tmp_path / "results"
    run.run_study(study, model, out)
    made = (out / "setup.json").read_bytes()
    (out / "setup.json").unlink()
    run.run_study(study, model, out)
    assert (out / "setup.json").read_bytes() == made


def test_directions_without_a_setup_are_kept(model, study, tmp_path):
    # `jaxsteer extract` writes such a file too.
    out = tmp_path / "results"
    prepare.prepare(study, model, out)
    (out / "setup.json").unlink()
    held = (out / "directions.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"is not a results folder.* give --fresh"):
        run.run_study(study, model, out)
    assert (out / "directions.safetensors").read_bytes() == held


def test_another_process_reads_a_setup_only_when_it_is_complete(model, study, tmp_path):
    out = tmp_path / "results"
    assert prepare.read(study, model, out) is None
    made = prepare.prepare(study, model, out)
    read = prepare.read(study, model, out)
    assert read.record == made.record
    assert prepare.hashes(read.directions) == prepare.hashes(made.directions)
    (out / "directions.safetensors").unlink()
    assert prepare.read(study, model, out) is None


OPEN = [
    ("dose = 3.0\n", ""),
    ("layers = { steer = 1, late = 1.0 }", "layers = { late = 1.0 }"),
    (PERSONA, PERSONA + 'refusal = { kind = "refusal" }\n'),
    (
        "max_new_tokens = 4\n",
        "max_new_tokens = 2\nlayers = [0.5]\nscales = [1.0]\nmax_degenerate = 1.0\n"
        "refusal_train = 2\nrefusal_validation = 2\nrefusal_layers = [0.5]\n"
        "allow_near_miss = true\n",
    ),
]


def test_scores_of_candidates_are_kept_when_a_setup_is_stopped(model, tmp_path, monkeypatch):
    study = spec.load(tiny.study_file(tmp_path, *OPEN))
    whole = prepare.prepare(study, model, tmp_path / "whole")
    assert whole.record.layers == {"late": 2, "refusal": 1, "steer": 1}
    assert whole.record.dose == 1.0

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(selection, "dose_candidates", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(study, model, tmp_path / "stopped")
    monkeypatch.setattr(selection, "refusal_candidates", stop)
    assert prepare.prepare(study, model, tmp_path / "stopped").record == whole.record


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"key": 1}', "[" * 100_000])
def test_a_damaged_setup_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "setup.json").write_text(text)
    with pytest.raises(UserError, match=r"setup\.json cannot be read") as caught:
        prepare.read_record(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_study_that_would_say_nothing_stops_before_anything_is_extracted(
    model, tmp_path, extracted
):
    study = spec.load(tiny.study_file(tmp_path, ("allow_uninformative = true\n", "")))
    with pytest.raises(UserError, match=r"study tiny: under policy generic .* stricter") as caught:
        run.run_study(study, model, tmp_path / "results")
    assert "\n" not in str(caught.value) and not extracted
    assert prepare.read_record(tmp_path / "results").policies[0].youden == 0


CHOOSE = [
    ('system = "generic"', 'system = "choose"'),
    ("prompts = 2\n", 'prompts = 2\npolicies = ["safety-strict", "safety-brief", "generic"]\n'),
]


def test_a_policy_is_chosen_and_the_run_records_it_with_how_it_was_scored(model, tmp_path):
    study = spec.load(tiny.study_file(tmp_path, *CHOOSE))
    run.run_study(study, model, tmp_path / "results")
    found = results.load(tmp_path / "results")
    # All are equally good for a model that never refuses, so the shortest is taken.
    assert found.run.study.system == "choose"
    assert found.run.policy.name == found.spec.system.name == "generic"
    assert {c.policy for c in found.run.candidates.policies} == {
        "generic",
        "safety-brief",
        "safety-strict",
    }
    run.run_study(study, model, tmp_path / "results")


WINDOW = [
    *OPEN,
    ('{ project = "persona", at = "late" }', '{ project = "persona", at = "window" }'),
    (
        '{ add = "random", at = "steer", scale = 4.0 }',
        '{ add = "random", at = "steer", scale = 4.0 }, '
        '{ add = "refusal", at = "late_refusal", scale = "refusal_dose" }',
    ),
    (
        "prompts = 2\n",
        "prompts = 2\nmax_change = 1.0\nwindows = { starts = [1], widths = [1, 2] }\n"
        "late = { layers = [1.0], scales = [2.0, 3.0] }\n",
    ),
]


def test_a_window_and_a_late_refusal_are_chosen_and_resolved_in_the_conditions(model, tmp_path):
    study = spec.load(tiny.study_file(tmp_path, *WINDOW))
    run.run_study(study, model, tmp_path / "results")
    record = prepare.read_record(tmp_path / "results")
    # Two layers do not fit behind the steering layer of a model of three.
    assert [(c.layer, c.width) for c in record.windows] == [(0, 0), (2, 1)]
    assert [(c.layer, c.width, c.scale) for c in record.late] == [
        (0, 0, 0.0),
        (2, 1, 2.0),
        (2, 1, 3.0),
    ]
    found = results.load(tmp_path / "results").run
    assert found.candidates == record.candidates
    assert (found.layers["window"], found.layers["window_last"]) == (2, 2)
    (out, late) = (found.named(name).operations[1] for name in ("persona, out", "random #1"))
    assert out.layers == (2,)
    assert (late.layers, late.scale) == ((2,), record.refusal_dose)


def test_what_the_persona_does_without_an_operation_is_rated_once(model, tmp_path, monkeypatch):
    study, asked, rates = spec.load(tiny.study_file(tmp_path, *WINDOW)), {}, Rater.rates

    def counted(self, cells, title):
        asked[title] = len(cells)
        return rates(self, cells, title)

    monkeypatch.setattr(Rater, "rates", counted)
    made = prepare.prepare(study, model, tmp_path / "results")
    windows, late = made.record.windows, made.record.late
    assert windows[0] == late[0]
    assert (asked["window"], asked["late refusal"]) == (2 * len(windows[1:]), 2 * len(late[1:]))
    chosen, prompts = made.spec.selection, prepare.split(made.spec, model).persona
    vectors, layers = made.directions["persona"].vectors, (made.record.layers["steer"],)
    persona = Add(direction=vectors, layers=layers, scale=made.record.dose)
    rater = Rater(model, chosen.max_new_tokens, made.spec.decoding.batch)
    anew = selection.restoring_candidates(rater, persona, prompts, {}, "anew")
    assert anew == windows[:1]


def test_fixed_windows_and_doses_are_not_chosen(model, tmp_path):
    changes = [
        *WINDOW,
        ("layers = { late = 1.0 }", "layers = { late = 1.0, window = 2, window_last = 2 }"),
        ("system =", "refusal_dose = 5.0\nsystem ="),
    ]
    study = spec.load(tiny.study_file(tmp_path, *changes))
    assert prepare.open_choices(study) == ["refusal", "steer", "dose", "late_refusal"]
    made = prepare.prepare(study, model, tmp_path / "results").record
    assert made.windows == () and {c.scale for c in made.late if c.width} == {5.0}
