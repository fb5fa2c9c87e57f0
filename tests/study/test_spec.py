from __future__ import annotations

import msgspec
import pytest

from jaxsteer.errors import UserError
from jaxsteer.study import spec

DEMO = (spec.STUDIES / "smollm2-demo.toml").read_text()


@pytest.mark.parametrize("name", spec.shipped())
def test_every_shipped_study_loads_and_its_name_is_its_files(name):
    assert spec.load(name).name == name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_new_tokens = 24", "max_new_token = 40", "max_new_token"),
        (
            "max_new_tokens = 24",
            "max_new_tokens = 0",
            r"\.toml:\d+: decoding\.max_new_t.* >= 1",
        ),
        ("n = 40", 'n = "many"', r"\.toml:\d+: prompts\[1\]\.n: Expected `int`, got `str`"),
        ("n = 40", "n = -1", r"prompts\[1\]\.n: .* >= 0"),
        ('name = "smollm2-demo"', "name = [", "TOML"),
        ('name = "smollm2-demo"', 'name = "../demo"', r"toml:\d+: name: Expected"),
        ('name = "baseline"', 'name = "persona"', "twice"),
        ('name = "restoration"', 'name = "suppression"', "twice"),
        ('name = "neutral persona"', 'name = "x, unsteered"', "a name that is kept for automatic"),
        ('add = "persona"', 'add = "charm"', "names 'charm', an unknown direction"),
        ('control = "baseline"', 'control = "base"', "names 'base'"),
        ('treated = "persona", control = "refusal"', 'treated = "x", control = "refusal"', "'x'"),
        (
            'tests = [{ treated = "persona", control = "baseline", expect = "lower" }]',
            "tests = []",
            "claim 'suppression' has no tests",
        ),
        ('control = "baseline"', 'control = "persona"', "compares 'persona' with itself"),
        (
            'says = "The persona direction lowers refusal."',
            'says = "x"\nneeds = ["restoration late"]',
            "claim 'suppression' needs 'restoration late', which is no claim above it",
        ),
        ('says = "It lowers', 'needs = ["supression"]\nsays = "It lowers', "needs 'supression'"),
        ("margin = -0.5", "margin = -1.0", r"tests\[0\]\.margin: .* > -1\.0"),
        (
            'expect = "few-raised", prompts = "benign", margin = 0.2',
            'expect = "few-raised", prompts = "benign", margin = 1.0',
            r"\.margin: .* < 1\.0",
        ),
        (
            '"few-raised", prompts = "benign", margin = 0.2',
            '"few-raised", prompts = "benign", margin = 0.0',
            "has a margin of 0",
        ),
        (
            '{ treated = "persona", control = "baseline", expect = "few-raised", prompts',
            '{ treated = "persona", control = "persona, unsteered", expect = "few-raised", prompts',
            "compares benign prompts, which 'persona, unsteered' does not run",
        ),
        (
            'prompts = "benign"',
            'prompts = "xstest"',
            "'xstest' prompts, and the study has strongreject",
        ),
        (
            'name = "baseline"\nbenign = true',
            'name = "baseline"',
            "compares benign prompts, which 'baseline' does not run",
        ),
        ('trait = "compliant-v2"', 'trait = "complaint"', r"toml:\d+: no trait complaint; give a"),
        ("early = 0.3", "early = 1.3", r"layers\.early: .* <= 1\.0"),
        ("early = 0.3", "early = -3", r"layers\.early: .* >= 0"),
        ('kind = "refusal"', 'kind = "trait"', "trait"),
        ('kind = "refusal"', 'kind = "minus"', "of"),
        (
            "layers = [0.5, 0.6, 0.7]\nscales",
            "layers = [0.5, 20.0]\nscales",
            r"layers\[1\]: .* <= 1\.0",
        ),
        ("scales = [2.0, 4.0]", "scales = []", r"selection\.scales: .* length >= 1"),
        ("max_new_tokens = 24", "max_new_tokens = 24\ntop_p = 0.0", "top_p"),
        ("max_new_tokens = 24", "max_new_tokens = 24\nseed = 2147483648", r"decoding\.seed: "),
        (
            'add = "random"',
            'add = "neutral"',
            "has random_seeds and no",
        ),
        (
            'scale = "refusal_dose", measured_at = "refusal" }',
            "scale = nan }",
            r"\.ops\[1\]\.scale",
        ),
        (
            "max_new_tokens = 24",
            "max_new_tokens = 24\ntemperature = inf",
            r"decoding\.temperature: ",
        ),
        ("scales = [2.0, 4.0]", "scales = [1.0, inf]", r"selection\.scales\[1\]: "),
        ("margin = -0.5", "margin = -inf", r"tests\[0\]\.margin"),
        ("# Named layers.", "dose = nan\n#", r"dose: "),
        (
            "allow_near_miss",
            'refusal_openings = ["I", ""]\nallow_near_miss',
            "openings",
        ),
        ("early = 0.3", "early = 0.3, early-2 = 4", "'early-2' cannot name a layer"),
        ("early = 0.3", "early = 0.3, last = 4", "'last' cannot name a layer"),
        ("early = 0.3", "early = 0.3, 20 = 4", "'20' cannot name a layer"),
        ("early = 0.3", "early = 0.3, 'a,b' = 4", "'a,b' cannot name a layer"),
        ("seeds = [1, 2, 3", "seeds = [1, -2, 3", r"random_seeds\[1\]"),
        ("seeds = [1, 2, 3", "seeds = [1, 9223372036854775808, 3", "random_seeds"),
        (
            'refusal = { kind = "refusal" }',
            'it = { kind = "minus", of = ["persona", "refusal"] }\nrefusal = { kind = "refusal" }',
            r"directions\.it\.of names 'refusal', which comes later",
        ),
        ('system = "choose"', 'system = "safety-v2"', "policies to choose from, and they need it"),
        ("neutral =", "random-1 =", r"directions\.random-1.* random controls"),
        ("neutral =", "random =", r"directions\.random: .* random controls"),
    ],
)
def test_a_malformed_study_names_the_key(tmp_path, old, new, message):
    assert old in DEMO
    path = tmp_path / "mine.toml"
    path.write_text(DEMO.replace(old, new, 1))
    with pytest.raises(UserError, match=message) as caught:
        spec.load(path)
    assert "mine.toml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "op", "message"),
    [
        ("", '{ add = "persona", project = "persona", at = "3" }', "'c': .* exactly one of add"),
        ("", '{ add = "persona" }', "missing required field `at`"),
        ("", '{ add = "persona", at = "3", scale = "much" }', "unit: Invalid enum value 'much'"),
        ("", '{ add = "persona", at = "3", scale = "each" }', "'c' needs both scales"),
        ("", '{ add = "random", at = "3" }', "'c' names `random`, which needs random_seeds"),
        ("", '{ add = "persona", everywhere = true }', "'c': everywhere goes with project"),
        (
            "",
            '{ project = "persona", everywhere = true, at = "3" }',
            "'c': everywhere .* replaces at",
        ),
        ("", '{ project = "persona", at = "3", scale = 2.0 }', "unknown field `scale`"),
        ("", '{ project = "persona", at = "3", norm_of = "refusal" }', "unknown field `norm_of`"),
        ("", '{ add = "persona", at = "3", norm_at = "3" }', "has a norm_at without norm_of"),
        ("", '{ add = "persona", at = "3", measured_at = "4,5" }', r"ops\[0\]\.measured_at"),
        ("", '{ add = "persona", at = "3", norm_of = "refusal", norm_at = "4..9" }', "norm_at"),
        ("scales = [1.0]", '{ project = "persona", at = "3" }', "'c' needs both scales"),
        (
            "random_seeds = [1]",
            '{ add = "persona", at = "steer", norm_of = "random" }',
            "'c' has random_seeds",
        ),
    ],
)
def test_an_operation_that_says_nothing_sensible_is_refused(tmp_path, more, op, message):
    path = tmp_path / "mine.toml"
    text = f'[[condition]]\nname = "c"\n{more}\nops = [{op}]\n\n[[claim]]'
    path.write_text(DEMO.replace("[[claim]]", text, 1))
    with pytest.raises(UserError, match=message):
        spec.load(path)


def test_operations_are_read_into_what_they_do(tmp_path):
    path = tmp_path / "mine.toml"
    ops = """ops = [
  { add = "refusal", at = "7", scale = "-dose", norm_of = "persona", norm_at = "steer" },
  { add = "persona", at = "2..4", scale = 2.0, measured_at = "steer" },
  { project = "persona", everywhere = true },
]"""
    path.write_text(DEMO.replace("[[claim]]", f'[[condition]]\nname = "c"\n{ops}\n[[claim]]', 1))
    norm = {"norm_of": "persona", "norm_at": "steer"}
    assert spec.load(path).condition[-1].ops == [
        spec.AddSpec(direction="refusal", at="7", scale=-1.0, unit="dose", **norm),
        spec.AddSpec(direction="persona", at="2..4", scale=2.0, measured_at="steer"),
        spec.ProjectSpec(direction="persona", at=None),
    ]


def test_a_study_read_from_its_record_is_the_same():
    for name in spec.shipped():
        study = spec.load(name)
        assert msgspec.convert(msgspec.to_builtins(study), spec.StudySpec) == study


def test_random_seeds_need_a_direction_to_take_norms_from(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nsystem = "generic"\nprompts = [{ set = "strongreject", n = 4 }]\n'
        'decoding = { max_new_tokens = 8 }\n[[condition]]\nname = "c"\nrandom_seeds = [1]\n'
        'ops = [{ add = "random", at = "1" }]\n'
    )
    with pytest.raises(UserError, match="a direction to take its norm from"):
        spec.load(path)


def test_an_unknown_study_lists_the_shipped_ones():
    with pytest.raises(UserError, match="smollm2-demo"):
        spec.load("nosuch")


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_mutated_studies_are_read_or_refused_in_one_line_never_a_traceback(count, tmp_path, rng):
    # Random edits: bytes flipped, lines dropped, doubled and swapped.
    path = tmp_path / "fuzz.toml"
    lines = DEMO.encode().splitlines(keepends=True)
    refused = 0
    for _ in range(count):
        mutated = list(lines)
        kind, at = int(rng.integers(4)), int(rng.integers(len(mutated)))
        if kind == 0:
            line = bytearray(mutated[at])
            line[int(rng.integers(len(line)))] = int(rng.integers(256))
            mutated[at] = bytes(line)
        elif kind == 1:
            del mutated[at]
        elif kind == 2:
            mutated.insert(at, mutated[int(rng.integers(len(mutated)))])
        else:
            other = int(rng.integers(len(mutated)))
            mutated[at], mutated[other] = mutated[other], mutated[at]
        path.write_bytes(b"".join(mutated))
        try:
            spec.load(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert count // 6 < refused < count
