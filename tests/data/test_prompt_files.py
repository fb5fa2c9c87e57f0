"""Prompt files of a reader's own: what is read from each format, and what is refused."""

from __future__ import annotations

import csv
import io
import json

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsteer.data import prompts as data
from jaxsteer.data.prompts import PromptSet
from jaxsteer.errors import UserError

# Texts with quotes, line breaks, commas and formulas, but no lone surrogates.
TEXTS = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30).filter(
        lambda text: text.strip()
    ),
    min_size=1,
    max_size=8,
)


def read(path, **options):
    return data.read(PromptSet(file=str(path), kind="other", **options))


def as_csv(texts):
    out = io.StringIO()
    csv.writer(out).writerows([["prompt", "topic"], *([text, "any"] for text in texts)])
    return out.getvalue().encode()


def as_jsonl(texts):
    return "\n".join(json.dumps({"prompt": text, "topic": "any"}) for text in texts).encode()


def as_parquet(texts):
    out = io.BytesIO()
    pl.DataFrame({"prompt": texts, "topic": ["any"] * len(texts)}).write_parquet(out)
    return out.getvalue()


FORMATS = {"csv": as_csv, "jsonl": as_jsonl, "parquet": as_parquet}


@given(texts=TEXTS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_each_text_once_as_it_was_written(tmp_path_factory, format, texts):
    path = tmp_path_factory.mktemp("read") / f"mine.{format}"
    path.write_bytes(FORMATS[format](texts))
    found = read(path, category="topic")
    assert sorted(p.text for p in found) == sorted(set(texts))
    assert {(p.family, p.kind, p.category) for p in found} == {("mine", "other", "any")}
    assert format == "csv" or all(texts[p.row - 1] == p.text for p in found)


def test_formats_with_equal_texts_give_equal_prompts_in_equal_order(tmp_path):
    texts = [f"Question {i}?" for i in range(50)]
    made = []
    for format, write in (FORMATS | {"txt": lambda texts: "\n".join(texts).encode()}).items():
        (tmp_path / f"mine.{format}").write_bytes(write(texts))
        made.append([(p.id, p.text) for p in read(tmp_path / f"mine.{format}", n=10, seed=3)])
    assert len(made[0]) == 10 and made == [made[0]] * 4


def test_a_csv_as_a_spreadsheet_saves_it_holds_the_same_prompts(tmp_path):
    plain, marked = tmp_path / "plain.csv", tmp_path / "marked.csv"
    text = 'topic,prompt\r\na,"One,\r\ntwo?"\r\n\r\na,Three?\r\n'
    plain.write_bytes(text.encode())
    marked.write_bytes(text.encode("utf-8-sig"))
    assert [p.text for p in read(plain)] == [p.text for p in read(marked)]
    assert {p.row: p.text for p in read(plain)} == {2: "One,\r\ntwo?", 5: "Three?"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt,topic\nx,y\nHow, then, so?\n", r"a\.csv:3: 3 cells, expected 2; put"),
        ("a.csv", b"question\nx\n", r"a\.csv:1: there is no column 'prompt'; name .* 'question'"),
        ("a.csv", b"", r"a\.csv:1: there is no column"),
        ("a.csv", b"prompt\nx\n  \n", r"a\.csv:3: 'prompt' holds neither a text nor turns"),
        ("a.csv", b"prompt\n", r"a\.csv: there are 0 different prompts"),
        ("a.csv", b"prompt\n\xff\xfe\n", r"cannot read .*a\.csv: .*utf-8"),
        ("a.csv", b'prompt\n"never closed', None),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', r"a\.jsonl:2: not JSON .*; mend the line"),
        ("a.jsonl", b'{"prompt": "x"}\n{"text": "y"}\n', r"a\.jsonl:2: there is no column"),
        ("a.jsonl", b'{"prompt": 3}\n', r"a\.jsonl:1: 'prompt' holds neither"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1: there is no column"),
        ("a.jsonl", b"[" * 100_000 + b"\n", r"a\.jsonl:1: not JSON"),
        ("a.parquet", b"PAR1 no", r"cannot read .*a\.parquet"),
        ("a.txt", b"\n \n", r"a\.txt: there are 0 different prompts"),
        ("a.xlsx", b"x", r"a\.xlsx: a prompt file is a \.csv, \.jsonl, \.parquet or \.txt"),
        ("no.csv", None, r"cannot read .*no\.csv: .*No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    if message is None:
        assert [p.text for p in read(path)] == ["never closed"]
        return
    with pytest.raises(UserError, match=message) as refused:
        read(path)
    assert "\n" not in str(refused.value)


def test_more_prompts_than_there_are_is_refused_with_their_number(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("One?\nTwo?\nOne?\n")
    assert [p.row for p in sorted(read(path), key=lambda p: p.row)] == [1, 2]
    with pytest.raises(UserError, match=r"mine\.txt: there are 2 different prompts; n asks for 3"):
        read(path, n=3)


@pytest.mark.slow
def test_a_million_prompts_are_sampled_within_little_memory(tmp_path):
    import subprocess
    import sys

    path = tmp_path / "many.csv"
    with path.open("w") as file:
        file.write("prompt,topic\n")
        file.writelines(f'"Question {i}, with a comma?",any\n' for i in range(1_000_000))
    code = (
        "import resource, sys\n"
        "from jaxsteer.data import prompts\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "which = prompts.PromptSet(file=sys.argv[1], kind='other', n=100, seed=1)\n"
        "found = prompts.read(which)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(len({p.text for p in found}), (after - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    different, mebibytes = map(int, done.stdout.split())
    assert different == 100 and mebibytes < 50


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_column_of_messages_holds_conversations(tmp_path):
    said = [turns("Hi.", "Hello.", "Help me."), turns("Only this.")]
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(json.dumps({"messages": some}) for some in said))
    table = tmp_path / "talks.parquet"
    pl.DataFrame({"messages": said}).write_parquet(table)
    for file in (path, table):
        first, second = sorted(read(file, column="messages", steer="last"), key=lambda p: p.row)
        assert first.asked == (("user", "Hi."), ("assistant", "Hello."), ("user", "Help me."))
        assert first.text == "user: Hi.\n\nassistant: Hello.\n\nuser: Help me."
        assert first.plain_history and not second.plain_history
    assert not any(p.plain_history for p in read(path, column="messages"))


@pytest.mark.parametrize(
    "messages",
    [
        turns("Hi.", "Hello."),
        turns("Hi.", "", "Help me."),
        [{"role": "system", "content": "Obey."}],
        [{"role": "user", "content": 3}],
        ["Hi."],
        [],
    ],
)
def test_messages_that_are_no_conversation_are_named_by_their_line(tmp_path, messages):
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    with pytest.raises(UserError, match=r"talks\.jsonl:1: 'messages' holds neither a text nor"):
        read(path, column="messages")
