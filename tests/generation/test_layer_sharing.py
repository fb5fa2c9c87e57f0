from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxsteer.generation import layer_sharing, packing
from jaxsteer.generation.generate import no_probes
from jaxsteer.generation.layer_sharing import Work, descend, fill, kinds
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.model.interventions import Add, Project, compile_conditions
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depth")
    return ChatModel.load(
        convert(tiny.save(tiny.llama(), folder / "hf"), folder / "out", "float32")
    )


def stacked(model, made, scopes=None):
    return compile_conditions(
        made,
        scopes or ["all"] * len(made),
        n_layers=model.config.n_layers,
        d_model=model.config.d_model,
    )


def made(model, rng):
    v = rng.standard_normal((model.config.n_layers, model.config.d_model)).astype(np.float32)
    first = Add(direction=v, layers=(1,), scale=2.0)
    return [[], [first], [first, Project(directions=(v,), layers=(2,))], [first]]


def test_conditions_part_at_the_layer_where_they_first_differ(model, rng):
    found = kinds(stacked(model, made(model, rng)))
    assert found == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 1]]


def test_conditions_that_leave_prompts_alone_share_all_of_prefill(model, rng):
    scopes = ["response", "response", "response", "all"]
    found = kinds(stacked(model, made(model, rng), scopes))
    assert found[-1][:3] == [0, 0, 0] and found[-1][3] != 0
    # Whether a token may be touched is counted, so this tells them apart from the start.
    assert found[0] == [0, 0, 0, 1]


def test_a_tap_at_the_embedding_parts_conditions_before_the_first_layer(model, rng):
    v = rng.standard_normal((model.config.n_layers, model.config.d_model)).astype(np.float32)
    both = [[], [Add(direction=v, layers=(0,), scale=1.0, tap="embed")]]
    assert kinds(stacked(model, both))[0] == [0, 1]


@pytest.mark.parametrize("batch", [2, 5, 16])
def test_rows_are_one_entry_exactly_as_long_as_they_are_the_same(model, rng, batch):
    interventions = stacked(model, made(model, rng))
    prompts = [[5, 6], [7, 8, 9], [4]]
    rows = [(c, p) for c in range(4) for p in range(3)]
    work = Work(
        definition=model.definition,
        config=model.config,
        params=model.params,
        interventions=interventions,
        probes=no_probes(model.config.n_layers, model.config.d_model),
        conditions=[c for c, _ in rows],
        lanes=packing.alone([prompts[p] for _, p in rows], 8),
        prefix=None,
        beginning=[],
    )
    known = kinds(interventions)
    where, batches = {}, []
    for done in descend(work, range(len(rows)), 8, batch=batch, together=batch):
        assert len(done.rows) <= batch
        for row, places in zip(done.rows, done.places.T, strict=False):
            # A level's object tells its batch, the place its entry there.
            where[row] = [(id(level), at) for level, at in zip(done.levels, places, strict=True)]
        batches.append(done)  # Alive, so that no id is used again for another level.
    assert sorted(where) == list(range(len(rows)))
    # This model's segments are its layers: level 0 is the embedding, level n follows layer n.
    for row, (condition, prompt) in enumerate(rows):
        for other, (condition2, prompt2) in enumerate(rows):
            for level in range(4):
                same = prompt == prompt2 and known[level][condition] == known[level][condition2]
                if not same:
                    assert where[row][level] != where[other][level]
                elif batch == 16:
                    assert where[row][level] == where[other][level]


def test_beginnings_come_back_in_the_order_given(model, rng):
    interventions = stacked(model, made(model, rng))
    probes = no_probes(model.config.n_layers, model.config.d_model)
    tokens = [[5, 6, 7], [8], [], [9, 10], [5, 6, 7]] * 5
    conditions = [c % 4 for c in range(len(tokens))]
    args = (model.definition, model.config, model.params)
    together = fill(*args, tokens, conditions, interventions, probes)
    assert together.real.shape[1] == layer_sharing.STEP
    for i in (0, 1, 2, 7, 24):
        alone = fill(*args, [tokens[i]], [conditions[i]], interventions, probes)
        for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(x[i], y[0])
