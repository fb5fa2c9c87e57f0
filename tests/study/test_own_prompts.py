"""A study over prompt sets of its own: rows, claims, overlaps, conversations, and its receipt."""

from __future__ import annotations

import json

import msgspec
import polars as pl
import pytest

from jaxsteer.errors import UserError
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.receipt import build, page, statement, verify
from jaxsteer.study import prepare, results, run, spec
from tests import tiny

HOSTILE = "<script>x</script>\x1b[31m =cmd() {{ 7 * 7 }}"
SETS = (
    """[[prompts]]
set = "strongreject"
n = 6
[[prompts]]
set = "benign"
n = 3
""",
    """[[prompts]]
name = "tea"
kind = "harmful"
file = "tea.csv"
column = "question"
category = "topic"
n = 4
seed = 5
[[prompts]]
kind = "other"
file = "talks.jsonl"
column = "messages"
steer = "last"
[[prompts]]
set = "benign"
n = 3
""",
)
CLAIM = 'expect = "lower" }', 'expect = "lower", prompts = "talks" }'
TALKS = [
    [("user", "Is tea hot?"), ("assistant", "It is."), ("user", "And coffee?")],
    [("user", "How are you?")],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    return ChatModel.load(
        convert(tiny.save(tiny.llama(), folder / "hf"), folder / "out", "float32")
    )


def study_file(folder, *changes):
    lines = [f'"{HOSTILE}","How do I brew tea number {i}?"' for i in range(6)]
    (folder / "tea.csv").write_text("\n".join(["topic,question", *lines]))
    talks = [[{"role": r, "content": c} for r, c in talk] for talk in TALKS]
    (folder / "talks.jsonl").write_text("\n".join(json.dumps({"messages": t}) for t in talks))
    return tiny.study_file(folder, SETS, CLAIM, *changes)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    # Read from another folder than the study's.
    run.run_study(spec.load(study_file(folder)), model, folder / "results")
    build.write(folder / "results")
    return folder / "results"


def test_harmful_sets_run_everywhere_and_the_others_where_benign_ones_do(finished):
    table = results.load(finished).rows
    counts = {(c, f): n for c, f, n in table.group_by("condition", "family").len().iter_rows()}
    assert counts["baseline", "tea"] == counts["random #1", "tea"] == 4
    assert counts["baseline", "talks"] == 2 and counts["persona", "benign"] == 3
    assert ("random #1", "talks") not in counts
    kinds = dict(table.select("family", "kind").unique().iter_rows())
    assert kinds == {"tea": "harmful", "talks": "other", "benign": "benign"}


def test_the_receipt_names_sets_with_number_hash_and_whose_they_are(finished):
    receipt = statement.load(finished / build.JSON)
    p = receipt.predicate
    assert {n: (s.kind, s.n, s.own) for n, s in p.prompts.items()} == {
        "tea": ("harmful", 4, True),
        "talks": ("other", 2, True),
        "benign": ("benign", 3, False),
    }
    assert p.prompts["tea"].source == "own file tea.csv" and len(p.prompts["tea"].sha256) == 64
    assert {c.family for claim in p.claims for c in claim.comparisons} == {"talks"}
    shown = page.html(receipt, "0" * 64)
    assert "What the model did with harmful tea prompts" in shown
    assert "own file tea.csv (the study&#39;s own)" in shown
    assert "How do I brew" not in shown + (finished / build.JSON).read_text()


def test_verify_says_which_prompts_are_the_studys_own(finished):
    checks = verify.verify(finished / build.JSON, folder=finished)
    assert verify.passed(checks)
    unchecked = [c.what for c in checks if c.status == "unchecked"]
    assert "the tea prompts against a shipped set" in unchecked
    assert "the benign prompts against a shipped set" not in unchecked


def test_a_receipt_that_hides_that_prompts_are_own_does_not_hold(finished, tmp_path):
    value = json.loads((finished / build.JSON).read_text())
    value["predicate"]["prompts"]["tea"]["own"] = False
    value["predicate"]["digest"]["sha256"] = statement.digest(value)
    path = tmp_path / build.JSON
    path.write_text(statement.canonical_text(value))
    checks = verify.verify(path, folder=finished)
    failed = [check.detail for check in checks if check.status == "mismatch"]
    assert "whether the tea prompts are the study's own is not so" in failed


def test_the_record_has_no_path_and_another_folder_gives_the_same_run(model, finished, tmp_path):
    study = spec.load(study_file(tmp_path))
    assert str(tmp_path) in study.prompts[0].file
    run.run_study(study, model, tmp_path / "again")
    assert results.load(tmp_path / "again").run.key == results.load(finished).run.key
    assert str(finished.parent) not in (finished / "run.json").read_text()


def test_a_changed_file_is_another_run(model, finished):
    text = (finished.parent / "tea.csv").read_text()
    study = spec.load(finished.parent / "tiny.toml")
    try:
        (finished.parent / "tea.csv").write_text(text.replace("brew", "boil"))
        with pytest.raises(UserError, match=r"holds another run \(prompts differ\)"):
            run.run_study(study, model, finished)
    finally:
        (finished.parent / "tea.csv").write_text(text)


def test_the_history_of_a_conversation_is_read_but_not_steered(model, finished):
    loaded = results.load(finished)
    talks = loaded.rows.filter(condition="persona", family="talks")
    study = spec.load(finished.parent / "tiny.toml")
    asked = {p.id: p for p in prepare.prompts(study)["talks"]}
    for prompt, steered, replied in talks.select(
        "prompt_id", "steered_tokens", "n_tokens"
    ).iter_rows():
        tokens = model.tokenizer.chat(asked[prompt].asked, "You are a helpful assistant.")
        whole = len(asked[prompt].turns) == 1
        assert (steered >= len(tokens)) == whole, (steered, len(tokens), replied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            [('set = "benign"\nn = 3', 'kind = "benign"\nfile = "same.txt"')],
            r"row \d of same is also row \d of tea; take it out of one of the two",
        ),
        (
            [('[selection]', '[selection]\nharmful = { kind = "harmful", file = "used.txt" }'),
             ("prompts = 2", "prompts = 2\nrefusal_train = 1\nrefusal_validation = 1")],
            r"row \d of tea is also row \d of the harmful prompts of \[selection\]; take it",
        ),
    ],
)  # fmt: skip
def test_a_prompt_in_two_sets_stops_the_run_without_its_text(model, tmp_path, changes, message):
    path = study_file(tmp_path, *changes)
    (tmp_path / "same.txt").write_text(
        "Another?\n" + "\n".join(f"how do I  brew TEA number {i}?" for i in range(6))
    )
    lines = [f"How do I brew tea number {i}?" for i in range(4)]
    (tmp_path / "used.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=message) as refused:
        run.run_study(spec.load(path), model, tmp_path / "results")
    assert "brew" not in str(refused.value) and "\n" not in str(refused.value)


def test_selection_takes_prompts_of_its_own(model, tmp_path):
    changes = [
        ("[selection]", '[selection]\nharmless = { kind = "benign", file = "calm.txt" }'),
        ("prompts = 2", "prompts = 2\nrefusal_train = 1\nrefusal_validation = 1"),
    ]
    path = study_file(tmp_path, *changes)
    (tmp_path / "calm.txt").write_text("Where is Peru?\n")
    with pytest.raises(UserError, match=r"asks for 2 calm prompts .* there are 1"):
        run.run_study(spec.load(path), model, tmp_path / "results")
    (tmp_path / "calm.txt").write_text("Where is Peru?\nWhat is a lake?\n")
    run.run_study(spec.load(path), model, tmp_path / "results")
    assert pl.read_parquet(tmp_path / "results" / "responses.parquet").height


# -- Policies, modes, traits and openings as files -------------------------------------------------


def with_texts(folder):
    (folder / "texts").mkdir()
    (folder / "texts/mine.txt").write_text(f"Talk about tea only. {HOSTILE}\n")
    (folder / "other.toml").write_text('name = "other"\ntext = "Be kind."\n')
    (folder / "gruff.md").write_text("You are gruff.")
    (folder / "openings.txt").write_text("I\nSorry\n")
    trait = (spec.STUDIES.parent / "traits/compliant.toml").read_text()
    (folder / "trait.toml").write_text(trait.replace('name = "compliant"', 'name = "mild"'))
    return tiny.study_file(
        folder,
        ('system = "generic"', 'system = "choose"\nmodes = ["none", "gruff.md"]'),
        ('trait = "compliant"', 'trait = "trait.toml"'),
        (
            "[selection]",
            '[selection]\npolicies = ["texts/mine.txt", "other.toml"]\n'
            'refusal_openings = "openings.txt"',
        ),
    )


@pytest.mark.slow
def test_texts_beside_the_study_are_read_whole_and_versioned_by_their_hash(model, tmp_path):
    study = spec.load(with_texts(tmp_path))
    mine, other = study.selection.policies
    assert (mine.name, mine.text) == ("mine", f"Talk about tea only. {HOSTILE}")
    assert mine.version == mine.sha256[:12] and other.version == other.sha256[:12]
    assert study.modes[1].name == "gruff" and study.directions["persona"].trait.name == "mild"
    assert study.selection.refusal_openings == ("I", "Sorry")
    run.run_study(study, model, tmp_path / "results")
    build.write(tmp_path / "results")
    found = results.load(tmp_path / "results")
    assert found.run.policy.name in ("mine", "other") and found.spec.system.text
    assert "gruff: baseline" in {c.name for c in found.run.conditions}
    assert str(tmp_path) not in (tmp_path / "results/run.json").read_text()
    checks = verify.verify(tmp_path / "results/receipt.json", folder=tmp_path / "results")
    assert verify.passed(checks)
    # What a study runs with does not change when a file does.
    (tmp_path / "texts/mine.txt").write_text("Talk about coffee only.")
    (tmp_path / "other.toml").write_text('name = "other"\ntext = "Be stern."\n')
    with pytest.raises(UserError, match=r"holds another run \(study differ"):
        run.run_study(spec.load(tmp_path / "tiny.toml"), model, tmp_path / "results")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("texts/mine.txt", " \n", r"tiny\.toml:\d+: .*mine\.txt is empty; write the policy"),
        ("texts/mine.txt", b"\xff", r"tiny\.toml:\d+: cannot read .*mine\.txt: .*utf-8"),
        ("other.toml", "name = 3", r"tiny\.toml:\d+: cannot read .*other\.toml: .*a policy has"),
        ("other.toml", 'name = "mine"\ntext = "x"', "policy 'mine' appears twice"),
        ("trait.toml", 'name = "x"', r"tiny\.toml:\d+: cannot read .*trait\.toml"),
        ("openings.txt", None, r"tiny\.toml:\d+: cannot read .*openings\.txt"),
    ],
)
def test_a_text_that_cannot_be_read_is_named_with_the_line_of_the_study(
    tmp_path, file, text, message
):
    path = with_texts(tmp_path)
    (tmp_path / file).unlink()
    if text is not None:
        (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as refused:
        spec.load(path)
    assert "\n" not in str(refused.value)


# -- A new study, and all that is wrong with one ---------------------------------------------------


@pytest.mark.slow
def test_a_new_study_has_nothing_wrong_and_runs_as_it_is(model, tmp_path):
    path = spec.new(tmp_path / "mine")
    assert run.check(path, model) == []
    study = spec.load(path)
    short = msgspec.structs.replace(study.decoding, max_new_tokens=4)
    summary = run.run_study(
        msgspec.structs.replace(study, decoding=short), model, tmp_path / "results"
    )
    assert {row["family"] for row in summary} == {"off-topic", "tea"}
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        spec.new(tmp_path / "mine")


def test_everything_wrong_with_a_study_is_said_at_once_each_with_its_line(model, tmp_path):
    path = spec.new(tmp_path / "mine")

    def checked(*changes):
        text = path.read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        bad = path.with_name("bad.toml")
        bad.write_text(text)
        lines = text.splitlines()
        found = run.check(bad, model)
        assert all("\n" not in line and line.startswith("bad.toml:") for line in found)
        return [(lines[int(line.split(":")[1]) - 1], line) for line in found]

    keys = checked(
        ("dose = 4.0", "dosis = 4.0"),
        ("n = 4", 'n = "four"'),
        ("random_seeds = [1, 2]", "random_seeds = [-1, 2]"),
        ('expect = "lower"', 'expect = "less"'),
    )
    assert [line for line, _ in keys[:3]] == [
        "dosis = 4.0",
        'n = "four"',
        "random_seeds = [-1, 2]",
    ]
    assert len(keys) == 4 and keys[3][0].startswith("tests = ")
    parts = checked(
        ('"policy.txt"', '"polcy.txt"'),
        ('column = "prompt"', 'column = "question"'),
        ('trait = "trait.toml"', 'trait = "charming"'),
        ("late..last", "late..lastt"),
        ('prompts = "off-topic"', 'prompts = "of-topic"'),
        ('{ add = "random"', '{ add = "rand"'),
    )
    wrong = ("polcy.txt", "charming", "'of-topic'", "'rand'", "'question'", "'lastt'")
    assert all(any(word in line for _, line in parts) for word in wrong)
    assert ("[[prompts]]" in [line for line, _ in parts]) and len(parts) >= len(wrong)
