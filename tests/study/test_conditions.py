from __future__ import annotations

import msgspec
import numpy as np
import pytest

from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.files import sha256_bytes
from jaxsteer.study import conditions, results, spec
from tests.study import stand_ins

L, D = 10, 8
NAMED = {"steer": 5, "early": 2, "refusal": 4, "late_refusal": 8, "window": 6, "window_last": 7}


def directions(seed=0):
    draw = np.random.default_rng(seed)
    names = ("persona", "neutral", "refusal", *(f"random-{seed}" for seed in range(1, 20)))
    return {
        n: Direction(name=n, vectors=draw.standard_normal((L, D)).astype(np.float32), provenance={})
        for n in names
    }


def by_name(study):
    found = conditions.conditions(study, NAMED, 4.0, L)
    arrays = conditions.stacked(found, directions(), (L, D))
    return {c.name: c for c in conditions.mark_cancelling(found, arrays)}


def words(condition):
    return [results.describe(operation) for operation in condition.operations]


def demo():
    """The demo's study, with a policy as its rule would choose it."""
    return msgspec.structs.replace(spec.load("smollm2-demo"), system="safety-v2")


def test_the_demo_study_has_its_planned_conditions_and_every_knockout_its_twin():
    found = by_name(demo())
    for name in ("baseline", "persona", "random direction #19", "neutral persona"):
        assert name in found
    knockouts = [c for c in found.values() if "out " in c.name and not c.unsteered_twin_of]
    knockouts = [c for c in knockouts if c.seed is None]
    assert len(knockouts) == 3
    for knockout in knockouts:
        twin = found[f"{knockout.name}, unsteered"]
        assert twin.unsteered_twin_of == knockout.name
        assert twin.operations == knockout.operations[1:]
        assert twin.prompts == knockout.prompts


def test_a_repeat_with_a_random_direction_is_a_control_itself_and_has_no_twin():
    found = by_name(demo())
    repeats = [c for name, c in found.items() if name.startswith("persona, random out of window")]
    assert len(repeats) == 19
    # Not even beside the same projection alone.
    alone = [msgspec.structs.replace(c, operations=c.operations[1:]) for c in repeats]
    assert [conditions.unsteered_twin(alone, c) for c in repeats] == [None] * 19


def test_only_the_knockout_at_the_steering_layer_cancels_steering():
    found = by_name(demo())
    assert [c.name for c in found.values() if c.cancels_steering] == [
        "persona, out at steering layer"
    ]


def test_dose_and_offsets_are_resolved_into_readable_sites():
    found = by_name(demo())
    assert words(found["persona"]) == ["add persona at resid_post.5 x4"]
    window = "project persona at resid_post.6..7 (measured at resid_post.5)"
    assert window in words(found["persona, out of window"])
    assert "project persona at resid_post.6..7" in words(
        found["persona, own vectors out of window"]
    )
    assert words(found["persona, refusal added late"])[1] == "add refusal at resid_post.8 x1"


def compiled(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(HEAD + text)
    return by_name(spec.load(path))


HEAD = """
name = "mine"
system = "safety-v1"
prompts = [{ set = "strongreject", n = 4 }, { set = "benign", n = 2 }]
decoding = { max_new_tokens = 8 }
[directions]
persona = { kind = "trait", trait = "compliant" }
refusal = { kind = "refusal" }
"""


def test_conditions_repeat_over_scales_seeds_and_modes(tmp_path):
    text = """
[[condition]]
name = "r"
random_seeds = [1, 2]
scales = [0.5, 2.0]
ops = [{ add = "random", at = "steer", scale = "each" }]
"""
    path = tmp_path / "mine.toml"
    path.write_text('modes = ["none", "direct"]\n' + HEAD + text)
    found = by_name(spec.load(path))
    assert list(found)[:5] == [
        "none: r x0.5 #1",
        "none: r x0.5 #2",
        "none: r x2 #1",
        "none: r x2 #2",
        "direct: r x0.5 #1",
    ]
    direct = found["direct: r x2 #1"]
    assert (direct.base, direct.seed, direct.scale, direct.mode) == ("r", 1, 2.0, "direct")
    systems = conditions.system_prompts(spec.load(path))
    assert systems["direct"].startswith("You are direct.")
    assert systems["none"] == systems["direct"].split("\n\n")[1]
    assert direct.system_sha256 == sha256_bytes(systems["direct"].encode())


def test_a_vector_can_take_anothers_norm(tmp_path):
    text = """
[[condition]]
name = "matched"
ops = [{ add = "refusal", at = "7", scale = -2.0, norm_of = "persona", norm_at = "steer" }]
"""
    matched = compiled(tmp_path, text)["matched"]
    assert words(matched) == ["add refusal at resid_post.7 x-2 (norm of persona at resid_post.5)"]
    (added,) = conditions.operations(matched, directions())
    norm = np.linalg.norm(directions()["persona"].vectors[5])
    np.testing.assert_allclose(np.linalg.norm(added.direction, axis=1), norm, rtol=1e-5)
    cosine = added.direction[7] @ directions()["refusal"].unit()[7] / norm
    assert added.scale == -2.0 and cosine == pytest.approx(1)


def test_a_vector_can_take_anothers_norm_layer_by_layer(tmp_path):
    text = """
[[condition]]
name = "matched"
random_seeds = [3]
ops = [
  { add = "random", at = "2..4", norm_of = "random" },
  { add = "refusal", at = "7", measured_at = "steer", norm_of = "persona" },
]
"""
    random, refusal = conditions.operations(compiled(tmp_path, text)["matched #3"], directions())
    known = directions()
    np.testing.assert_allclose(random.direction, known["random-3"].vectors, rtol=1e-6)
    norms = np.linalg.norm(known["persona"].vectors, axis=1)
    np.testing.assert_allclose(np.linalg.norm(refusal.direction, axis=1), norms, rtol=1e-5)
    assert (random.layers, refusal.layers, refusal.measured_at) == ((2, 3, 4), (7,), 5)


def test_strengths_may_be_doses_of_the_study(tmp_path):
    (tmp_path / "mine.toml").write_text(
        HEAD
        + """
[[condition]]
name = "c"
scope = "response"
benign = true
ops = [
  { add = "persona", at = "5", scale = "-dose" },
  { add = "refusal", at = "5", scale = "refusal_dose" },
  { project = "persona", everywhere = true, measured_at = "5" },
]
"""
    )
    study = spec.load(tmp_path / "mine.toml")
    found, twin = conditions.conditions(study, NAMED, 4.0, L, 3.0)
    scales = [getattr(op, "scale", None) for op in found.operations]
    assert scales == [-4.0, 3.0, None]
    assert [op.measured_at for op in found.operations] == [None, None, 5]
    taps = [op.tap for op in conditions.operations(found, directions())]
    assert taps == ["resid_post", "resid_post", "embed", "resid_mid", "resid_post"]
    assert (found.scope, found.benign) == ("response", True)
    assert (twin.scope, twin.benign) == ("response", False)
    assert (twin.name, twin.base) == ("c, unsteered", "c, unsteered")
    (system,) = conditions.system_prompts(study).values()
    assert found.system_sha256 == sha256_bytes(system.encode())


def test_knockouts_of_other_scopes_or_prompts_have_twins_of_their_own(tmp_path):
    ops = '[{ add = "persona", at = "5" }, { project = "persona", at = "6" }]'
    text = "".join(
        f'[[condition]]\nname = "{name}"\nops = {ops}\n{more}\n'
        for name, more in (("a", ""), ("b", 'scope = "prompt"'), ("c", "prompts = 2"))
    )
    found = compiled(tmp_path, text)
    assert list(found) == ["a", "b", "c", "a, unsteered", "b, unsteered", "c, unsteered"]
    for name in "abc":
        twin = conditions.unsteered_twin(list(found.values()), found[name])
        assert twin is found[f"{name}, unsteered"]


def test_a_repeated_strength_is_refused(tmp_path):
    text = '[[condition]]\nname = "c"\nscales = [1.0, 1.0]\n'
    text += 'ops = [{ add = "persona", at = "5", scale = "each" }]'
    with pytest.raises(UserError, match="'c x1' repeats a seed, scale or mode"):
        compiled(tmp_path, text)


def test_an_addition_of_nothing_beside_something_is_kept(tmp_path):
    text = """
[[condition]]
name = "c"
scales = [0.0, 1.0]
ops = [{ add = "persona", at = "5", scale = "each" }, { add = "refusal", at = "5" }]
"""
    assert list(compiled(tmp_path, text)) == ["c x0", "c x1"]


@pytest.mark.parametrize(("fraction", "layer"), [(0.0, 0), (0.5, 4), (0.6, 5), (1.0, 9)])
def test_a_share_of_depth_is_the_nearest_layer(fraction, layer):
    assert conditions.depth(fraction, L) == layer


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ('{ add = "persona", at = "99" }', "resid_post.99"),
        ('{ add = "persona", at = "3", scale = 0.0 }', "strength of 0 changes nothing"),
    ],
)
def test_an_operation_that_cannot_be_done_is_refused_by_name(tmp_path, op, message):
    with pytest.raises(UserError, match=f"'c'.*{message}"):
        compiled(tmp_path, f'[[condition]]\nname = "c"\nops = [{op}]')


def test_an_addition_in_the_span_of_what_is_projected_out_cancels(tmp_path):
    text = """
[[condition]]
name = "both"
ops = [
  { add = "persona", at = "3..5", norm_of = "refusal" },
  { project = "refusal", at = "5" },
  { project = "persona", at = "5" },
]
[[condition]]
name = "other layer's vector"
ops = [{ add = "persona", at = "5" }, { project = "persona", at = "5", measured_at = "4" }]
[[condition]]
name = "everywhere"
ops = [{ add = "persona", at = "5" }, { project = "persona", everywhere = true }]
"""
    found = compiled(tmp_path, text).values()
    assert [c.name for c in found if c.cancels_steering] == ["both", "everywhere"]


def test_a_knockout_alone_has_no_twin_and_equal_twins_are_made_once(tmp_path):
    text = """
[[condition]]
name = "alone"
ops = [{ project = "persona", at = "6" }]
[[condition]]
name = "a"
ops = [{ add = "persona", at = "5" }, { project = "persona", at = "6" }]
[[condition]]
name = "b"
ops = [{ add = "refusal", at = "5" }, { project = "persona", at = "7" }]
[[condition]]
name = "c"
ops = [{ add = "persona", at = "5", scale = 2.0 }, { project = "persona", at = "7" }]
"""
    assert list(compiled(tmp_path, text)) == ["alone", "a", "b", "c", "b, unsteered"]


def test_every_mode_has_its_twin_even_when_two_have_the_same_text(tmp_path):
    (tmp_path / "empty.toml").write_text('name = "empty"\nversion = "1"\ntext = ""\n')
    path = tmp_path / "mine.toml"
    ops = '[{ add = "persona", at = "5" }, { project = "persona", at = "6" }]'
    modes = f'modes = ["none", "{tmp_path}/empty.toml"]\n'
    path.write_text(modes + HEAD + f'[[condition]]\nname = "out"\nops = {ops}')
    twins = [c for c in by_name(spec.load(path)).values() if c.unsteered_twin_of]
    assert [twin.mode for twin in twins] == ["none", "empty"]
    assert twins[0].system_sha256 == twins[1].system_sha256


def test_an_unknown_mode_is_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('modes = ["pirate"]\n' + HEAD + '[[condition]]\nname = "c"')
    with pytest.raises(UserError, match="no mode 'pirate'"):
        by_name(spec.load(path))


@pytest.mark.parametrize("name", ["llama3.1-8b-paper", "qwen2.5-7b-paper"])
def test_the_paper_studies_compile_for_their_models_with_every_condition_of_the_paper(name):
    compiled = stand_ins.compiled(spec.load(name))
    names = [condition.name for condition in compiled]
    # The reference study has 63 conditions for Llama and 64 for Qwen, the baseline among them.
    blocks = {"persona, natural", "user persona, natural", "I-Thou, natural", "minus refusal"}
    blocks |= {"I-Thou without assistant axis", "random, norm of I-Thou", "baseline"}
    blocks |= {"I-Thou at several blocks", "refusal out of blocks 14 to 27"}
    first = [condition for condition in compiled if condition.base in blocks]
    assert len(first) == (63 if name.startswith("llama") else 64)
    assert len([n for n in names if n.startswith("persona, random out at 22 #")]) >= 20
    cancelling = [condition.name for condition in compiled if condition.cancels_steering]
    assert cancelling == ["persona, out at steering layer"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", (7,)),
        ("steer", (5,)),
        ("steer+2", (7,)),
        ("steer+1..last", (6, 7, 8, 9)),
        ("2..4", (2, 3, 4)),
        ("2,4", (2, 4)),
        ("1,steer..last", (1, 5, 6, 7, 8, 9)),
    ],
)
def test_layer_expressions(text, expected):
    assert conditions.resolve_layers(text, NAMED, L, "test") == expected


def test_a_window_goes_on_to_its_last_layer():
    named = {"window": 3, "window_last": 5}
    assert conditions.resolve_layers("window, 8", named, L, "test") == (3, 4, 5, 8)
    assert conditions.resolve_layers("window+1", named, L, "test") == (4,)


@pytest.mark.parametrize("name", ["late2", "late-two", "late_2", "Late", "spät"])
@pytest.mark.parametrize(("offset", "expected"), [("", 6), ("+1", 7), ("-2..last", 4)])
def test_a_layer_may_have_any_name_that_a_study_may_give_it(name, offset, expected):
    assert conditions.resolve_layers(name + offset, {name: 6}, L, "test")[0] == expected


@pytest.mark.parametrize(
    "text",
    ["-1", "steer+9", "10", "nowhere", "steer*2", "", "4..2", "2,,3", "²", "9" * 5000, "last-²"],
)
def test_layers_that_do_not_exist_are_refused(text):
    with pytest.raises(UserError, match="test"):
        conditions.resolve_layers(text, NAMED, L, "test")


@pytest.mark.parametrize("text", ["2-4", "1,2-4"])
def test_a_window_written_with_a_hyphen_is_refused_with_the_right_spelling(text):
    with pytest.raises(UserError, match=r"write a window as 2\.\.4$"):
        conditions.resolve_layers(text, NAMED, L, "test")
