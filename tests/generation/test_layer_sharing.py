from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsteer.generation import layer_sharing
from jaxsteer.generation.engine import Request
from jaxsteer.generation.layer_sharing import (
    Prompts,
    equivalence_classes,
    layer_groups,
    read,
    run_prefixes,
)
from jaxsteer.generation.prefill import no_probes
from jaxsteer.generation.requests import one_each
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.model.interventions import Add, Project, compile_conditions
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharing")
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
    found = equivalence_classes(stacked(model, made(model, rng)))
    assert found == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 1]]


def test_conditions_that_leave_prompts_alone_share_all_of_prefill(model, rng):
    scopes = ["response", "response", "response", "all"]
    found = equivalence_classes(stacked(model, made(model, rng), scopes))
    assert found[-1][:3] == [0, 0, 0] and found[-1][3] != 0
    # The number of steered tokens is counted, so the scope tells them apart from the start.
    assert found[0] == [0, 0, 0, 1]


def test_a_tap_at_the_embedding_parts_conditions_before_the_first_layer(model, rng):
    v = rng.standard_normal((model.config.n_layers, model.config.d_model)).astype(np.float32)
    both = [[], [Add(direction=v, layers=(0,), scale=1.0, tap="embed")]]
    assert equivalence_classes(stacked(model, both))[0] == [0, 1]


@pytest.mark.parametrize("size", [2, 5, 16])
def test_rows_are_one_entry_exactly_as_long_as_they_are_the_same(model, rng, size):
    interventions = stacked(model, made(model, rng))
    tokens = [[5, 6], [7, 8, 9], [4]]
    rows = [(c, p) for c in range(4) for p in range(3)]
    prompts = Prompts(
        model=model,
        requests=[Request(tokens=tokens[p], condition=c) for c, p in rows],
        interventions=interventions,
        probes=no_probes(model.config),
        packed=one_each([tokens[p] for _, p in rows], 8),
    )
    classes = equivalence_classes(interventions)
    where, kept = {}, []
    for some, batch in read(prompts, range(len(rows)), size=size):
        for row, entries in zip(some, batch.entry, strict=False):
            # An output's object tells its batch, the index its entry there.
            where[row] = [
                (id(output), at) for output, at in zip(batch.outputs, entries, strict=True)
            ]
        kept.append(batch)  # Alive, so that no id is used again for another output.
    assert sorted(where) == list(range(len(rows)))
    # This model's groups are its layers: output 0 is the embedding, output n follows layer n.
    for row, (condition, prompt) in enumerate(rows):
        for other, (condition2, prompt2) in enumerate(rows):
            for depth in range(4):
                same = prompt == prompt2 and classes[depth][condition] == classes[depth][condition2]
                if not same:
                    assert where[row][depth] != where[other][depth]
                elif size == 16:
                    assert where[row][depth] == where[other][depth]


def test_prefixes_come_back_in_the_order_given(model, rng):
    interventions = stacked(model, made(model, rng))
    tokens = [[5, 6, 7], [8], [], [9, 10], [5, 6, 7]] * 5
    conditions = [c % 4 for c in range(len(tokens))]
    asked = [(tuple(ids), condition) for ids, condition in zip(tokens, conditions, strict=True)]
    together, entry = run_prefixes(model, asked, interventions)
    assert together.real.shape[1] == layer_sharing.PREFIX_MULTIPLE
    for i in (0, 1, 2, 7, 24):
        alone, _ = run_prefixes(model, [asked[i]], interventions)
        for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(x[entry[i]], y[0], atol=1e-5)


@given(st.integers(1, 200))
def test_layer_groups_cover_every_layer_once_in_order_and_compile_two_programs_at_most(n_layers):
    found = layer_groups(n_layers)
    assert [layer for first, last in found for layer in range(first, last)] == list(range(n_layers))
    assert len(found) <= 10
    sizes = [last - first for first, last in found]
    assert len(set(sizes)) == 1 or sizes[-1] < sizes[0] == max(sizes[:-1]) == min(sizes[:-1])


@pytest.mark.parametrize(
    ("n_layers", "sizes"),
    [
        (1, [1]),
        (11, [2, 2, 2, 2, 2, 1]),
        # Llama-3.2-1B, Qwen2.5-0.5B, Qwen2.5-7B, SmolLM2-135M, Llama-3.1-8B, Qwen2.5-3B and
        # Llama-3.1-70B.
        (16, [2] * 8),
        (24, [3] * 8),
        (28, [4] * 7),
        (30, [3] * 10),
        (32, [4] * 8),
        (36, [4] * 9),
        (80, [8] * 10),
    ],
)
def test_the_layer_groups_of_known_models_are_these(n_layers, sizes):
    assert [last - first for first, last in layer_groups(n_layers)] == sizes
