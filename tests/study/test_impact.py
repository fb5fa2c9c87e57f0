"""Benign impact on a tiny random model: divergence beside HF transformers, answers, resume."""

from __future__ import annotations

import msgspec
import numpy as np
import polars as pl
import pytest
import torch
from scipy.special import log_softmax

from jaxsteer.data import prompts as data
from jaxsteer.directions import direction
from jaxsteer.evidence.outcomes import impacts
from jaxsteer.files import read_table
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.study import conditions, impact, prepare, results, run, spec
from tests import compiles, tiny

MEASURED = ("[decoding]", "[impact]\ncompared = 2\nquestions = 5\n[decoding]")
ADDED = '[[condition]]\nname = "random"'
BENIGN_OUT = f"""[[condition]]
name = "out alone"
benign = true
ops = [{{ project = "persona", at = "late" }}]
{ADDED}"""


@pytest.fixture(scope="module")
def hf():
    return tiny.llama()


@pytest.fixture(scope="module")
def model(hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("impact")
    return ChatModel.load(convert(tiny.save(hf, folder / "hf"), folder / "out", "float32"))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    study = spec.load(tiny.study_file(folder, MEASURED, (ADDED, BENIGN_OUT)))
    run.run_study(study, model, folder / "results")
    return folder / "results"


def table(folder):
    return read_table(folder / impact.FILE, "")


def test_each_benign_condition_has_a_line_for_each_question_and_compared_reply(finished):
    found = table(finished).group_by("measure", "condition").len()
    assert sorted(found.rows()) == [
        ("answer", "baseline", 5), ("answer", "out alone", 5), ("answer", "persona", 5),
        ("kl", "out alone", 2), ("kl", "persona", 2),
    ]  # fmt: skip


def test_the_divergence_is_that_of_hf_logits_on_the_untouched_models_replies(hf, model, finished):
    known, rows = results.read_run(finished), results.load(finished).rows
    # The persona is added to the output of block 1, at every token.
    vector = 3.0 * directions_of(finished)["persona"].vectors[1]
    system = data.policy(known.study.system).text
    measured = table(finished).filter(measure="kl", condition="persona")
    assert measured.height == 2
    for prompt, value in measured.select("prompt_id", "value").iter_rows():
        text = next(p.text for p in data.benign() if p.id == prompt)
        said = rows.filter(condition="baseline", prompt_id=prompt)["response"].item()
        before, reply = model.tokenizer.chat(text, system), model.tokenizer.encode(said)
        plain, steered = (logits(hf, [*before, *reply], add) for add in (0 * vector, vector))
        at = slice(len(before) - 1, len(before) + len(reply) - 1)
        p, q = log_softmax(plain[at], axis=1), log_softmax(steered[at], axis=1)
        assert value == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=2e-3)


def directions_of(folder):
    return direction.load(folder / "directions.safetensors")


def logits(hf, tokens, add):
    """HF's logits with a vector added to the output of block 1."""

    def adding(module, given, out):
        moved = torch.tensor(add, dtype=torch.float32)
        return (out[0] + moved, *out[1:]) if isinstance(out, tuple) else out + moved

    hook = hf.model.layers[1].register_forward_hook(adding)
    try:
        with torch.no_grad():
            return hf(torch.tensor([tokens])).logits[0].double().numpy()
    finally:
        hook.remove()


def test_another_condition_compiles_nothing(model, finished):
    known, rows = results.read_run(finished), results.load(finished).rows
    named = {c.name: c for c in known.conditions}
    every = prepared(known, finished, model)
    fewer = [named["baseline"], named["persona"]]
    some = every._replace(
        run=msgspec.structs.replace(known, conditions=fewer),
        arrays=every.arrays.rows(np.array([0, 1])),
    )
    benign = every.families["benign"][:2]
    impact.divergence(some, benign, rows)
    with compiles.counted() as found:
        impact.divergence(every, benign, rows)
    assert {name: found[name] for name in ("run_layers", "embed", "_kl")} == {
        "run_layers": 0,
        "embed": 0,
        "_kl": 0,
    }


def prepared(known, folder, model):
    directions, shape = directions_of(folder), (model.config.n_layers, model.config.d_model)
    arrays = conditions.stacked(known.conditions, directions, shape)
    families = prepare.prompts(known.study)
    return results.Prepared(known, model, arrays, directions, families, folder)


def test_an_interrupted_measurement_is_continued(model, finished, monkeypatch):
    before, run_again = table(finished), []
    shards = sorted((finished / impact.SHARDS).iterdir())
    # The shard with the most lines of answers is lost, and the table with it.
    lost = max(shards, key=lambda path: pl.read_parquet(path).filter(measure="answer").height)
    gone = pl.read_parquet(lost).height
    lost.unlink()
    (finished / impact.FILE).unlink()
    plain = impact.engine.run

    def watched(model, requests, *given, skip=(), **more):
        run_again.append(len(requests) - len(skip))
        return plain(model, requests, *given, skip=skip, **more)

    monkeypatch.setattr(impact.engine, "run", watched)
    impact.measure(prepared(results.read_run(finished), finished, model))
    assert run_again == [gone]
    assert table(finished).equals(before)


def test_the_impact_compares_each_condition_with_the_untouched_model(finished):
    found = results.load(finished)
    made = impacts(found)
    assert list(made) == ["baseline", "persona", "out alone"]
    assert made["baseline"].divergence is None and made["baseline"].length is None
    persona = made["persona"]
    assert persona.divergence.n == 2 and persona.divergence.mean > 0
    assert persona.answers.n == 5 and persona.length.n == 3
    benign = found.rows.filter(family="benign")
    by_prompt = benign.pivot("condition", index="prompt_id", values="n_tokens")
    assert persona.length.mean == pytest.approx(
        (by_prompt["persona"] - by_prompt["baseline"]).mean()
    )


def test_a_study_that_asks_for_nothing_has_no_table(model, tmp_path):
    study = spec.load(tiny.study_file(tmp_path))
    run.run_study(study, model, tmp_path / "results")
    assert not (tmp_path / "results" / impact.FILE).exists()
    assert impacts(results.load(tmp_path / "results")) == {}
