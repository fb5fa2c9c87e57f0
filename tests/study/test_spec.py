from __future__ import annotations

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
        ("max_new_tokens = 40", "max_new_token = 40", "max_new_token"),
        ("max_new_tokens = 40", "max_new_tokens = 0", "max_new_tokens is 0"),
        ("benign = 32", 'benign = "many"', r"str.*\$\.data\.benign"),
        ("benign = 32", "benign = -1", r"data\.benign is -1"),
        ('name = "smollm2-demo"', "name = [", "TOML"),
        ('name = "smollm2-demo"', 'name = "../demo"', "letters"),
        ('name = "baseline"', 'name = "persona"', "twice"),
        ('name = "restoration late"', 'name = "suppression"', "twice"),
        ('add = "persona"', 'add = "charm"', "unknown direction 'charm'"),
        ('control = "baseline"', 'control = "base"', "names 'base'"),
        ('treated = "persona", control = "refusal"', 'treated = "x", control = "refusal"', "'x'"),
        (
            'tests = [{ treated = "persona", control = "baseline", expect = "lower" }]',
            "tests = []",
            "claim 'suppression' has no tests",
        ),
        ('control = "baseline"', 'control = "persona"', "compares 'persona' with itself"),
        ("margin = -0.5", "margin = -1.0", r"margin of -1; cosine-above needs .* -1 and 1"),
        (
            'expect = "few-raised", family',
            'expect = "few-raised", margin = 1.0, family',
            "claim 'benign unharmed' has a margin of 1; few-raised needs one between 0 and 1",
        ),
        ('"few-raised", family', '"few-raised", margin = 0.0, family', "has a margin of 0"),
        (
            '{ treated = "persona", control = "baseline", expect = "few-raised", family',
            '{ treated = "persona", control = "persona, unsteered", expect = "few-raised", family',
            "which a twin such as 'persona, unsteered' does not run",
        ),
        ("max_new_tokens = 40", "max_new_tokens = 40\ntemperature = 1e-38", "at least 1e-6"),
        ("benign = 32", "benign = 0", r"'benign unharmed' .*and data\.benign is 0"),
        (
            'name = "baseline"\nbenign = true',
            'name = "baseline"',
            "'benign unharmed' compares benign prompts; give 'baseline' benign = true",
        ),
        (
            "max_new_tokens = 40",
            "max_new_tokens = 1\n[[condition]]\nname = 'r'\nscope = 'response'\n"
            "ops = [{ add = 'persona', at = '3' }]\n",
            "'r': scope response changes nothing with max_new_tokens = 1",
        ),
        ("early = 0.3", "early = 1.3", "between 0 and 1"),
        ("early = 0.3", "early = -3", "count from 0"),
        ('kind = "refusal"', 'kind = "trait"', "trait"),
        ('kind = "refusal"', 'kind = "minus"', "of"),
        ("scales = [1.0, 2.0, 4.0]", "scales = []", "scales is empty"),
        ("max_new_tokens = 40", "max_new_tokens = 40\ntop_p = 0.0", "top_p"),
        ("max_new_tokens = 40", "max_new_tokens = 40\nseed = 2147483648", "seed is 2147483648"),
        ("random_seeds = [1, 2, 3]\n", "scales = [1.0]\n", r"'random direction' has scales"),
        ('add = "random"', 'add = "neutral"', r"'random direction' has random_seeds"),
        (
            'measured_at = "refusal" }',
            "scale = nan }",
            r"refusal added early'\]\.ops\[1\]\.scale is",
        ),
        ("max_new_tokens = 40", "max_new_tokens = 40\ntemperature = inf", r"temperature is inf"),
        ("scales = [1.0, 2.0, 4.0]", "scales = [1.0, inf]", r"selection\.scales\[1\] is inf"),
        ("margin = -0.5", "margin = -inf", r"anti-parallel'\]\.tests\[0\]\.margin is -inf"),
        ("# Named layers.", "dose = nan\n#", "dose is nan"),
        ("allow_near_miss", 'refusal_openings = ["I", ""]\nallow_near_miss', "an empty text"),
        ("early = 0.3", "early = 0.3, early-2 = 4", "'early-2' is no name for a layer"),
        ("early = 0.3", "early = 0.3, last = 4", "'last' is no name for a layer"),
        ("early = 0.3", "early = 0.3, 20 = 4", "'20' is no name for a layer"),
        ("early = 0.3", "early = 0.3, 'a,b' = 4", "'a,b' is no name for a layer"),
        ("seeds = [1, 2, 3]", "seeds = [1, -2]", r"'random direction': random_seeds holds -2"),
        ("seeds = [1, 2, 3]", "seeds = [1, 9223372036854775808]", "random_seeds holds 92"),
        (
            'refusal = { kind = "refusal" }',
            'it = { kind = "minus", of = ["persona", "refusal"] }\nrefusal = { kind = "refusal" }',
            r"directions\.it\.of names 'refusal', which is not before it",
        ),
        ("neutral =", "random-1 =", r"directions\.random-1.* random controls"),
        ("neutral =", "random =", r"directions\.random: .* random controls"),
    ],
)
def test_a_malformed_study_names_the_key_and_the_value(tmp_path, old, new, message):
    assert old in DEMO
    path = tmp_path / "mine.toml"
    path.write_text(DEMO.replace(old, new, 1))
    with pytest.raises(UserError, match=message) as caught:
        spec.load(path)
    assert "mine.toml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("repeats", "op", "message"),
    [
        ("scales = [1.0]", '{ project = "persona", at = "steer", scale = "each" }', "has scales"),
        (
            "random_seeds = [1]",
            '{ add = "persona", at = "steer", norm_of = "random" }',
            "has random_seeds",
        ),
    ],
)
def test_repeats_need_an_operation_that_they_change(tmp_path, repeats, op, message):
    path = tmp_path / "mine.toml"
    more = f'[[condition]]\nname = "repeated"\n{repeats}\nops = [{op}]\n\n[[claim]]'
    path.write_text(DEMO.replace("[[claim]]", more, 1))
    with pytest.raises(UserError, match=f"'repeated' {message}"):
        spec.load(path)


def test_random_seeds_need_a_direction_to_take_norms_from(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nsystem = "generic"\ndata = { harmful = 4, benign = 2 }\n'
        'decoding = { max_new_tokens = 8 }\n[[condition]]\nname = "c"\nrandom_seeds = [1]\n'
        'ops = [{ add = "random", at = "1" }]\n'
    )
    with pytest.raises(UserError, match="need a direction in"):
        spec.load(path)


def test_an_unknown_study_lists_the_shipped_ones():
    with pytest.raises(UserError, match="smollm2-demo"):
        spec.load("nosuch")


def test_mutated_studies_are_read_or_refused_in_one_line_never_a_traceback(tmp_path, rng):
    # 600 random edits: bytes flipped, lines dropped, doubled and swapped.
    path = tmp_path / "fuzz.toml"
    lines = DEMO.encode().splitlines(keepends=True)
    refused = 0
    for _ in range(600):
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
    assert 100 < refused < 600
