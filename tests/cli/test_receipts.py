"""The receipt commands: exit codes, output, hostile names."""

from __future__ import annotations

import json
import shutil

import msgspec
import pytest

from jaxsteer.receipt import build
from tests.cli.command import here, jaxsteer
from tests.receipt import made
from tests.receipt.test_page import HOSTILE


def run(*args):
    """(exit code, stdout, stderr) of `jaxsteer ARGS`, in this process."""
    done = here(*args)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made.folder(tmp_path_factory.mktemp("cli") / "made")


def test_receipt_of_a_folder_builds_verifies_and_shows_its_claims(folder):
    code, out, _ = run("receipt", folder)
    assert code == 0
    assert "suppression" in out
    # What is confirmed comes first, what was not tested last.
    assert out.index("benign") < out.index("not tested")
    assert (folder / build.JSON).is_file()
    assert (folder / build.HTML).is_file()
    code, out, _ = run("receipt", "verify", folder / build.JSON, "--results", folder)
    assert code == 0
    assert "The receipt holds" in out


def test_the_schema_is_printed_as_json():
    code, out, _ = run("receipt", "schema")
    assert code == 0
    assert json.loads(out)["title"] == "jaxsteer refusal receipt"


def test_options_may_come_before_the_folder_and_build_may_be_named(folder, tmp_path):
    assert run("receipt", "--samples", 2, folder, "--out", tmp_path / "a")[0] == 0
    assert run("receipt", "build", folder, "--samples", 2, "--out", tmp_path / "b")[0] == 0
    first, second = ((tmp_path / n / build.JSON).read_bytes() for n in "ab")
    assert first == second
    assert b'"excerpt"' in first


def test_a_changed_receipt_exits_1_and_no_receipt_exits_2(folder, tmp_path):
    build.write(folder, tmp_path)
    path = tmp_path / build.JSON
    path.write_text(path.read_text().replace('"k": 18', '"k": 17', 1))
    code, out, _ = run("receipt", "verify", path)
    assert code == 1
    assert "does not match" in out
    path.write_text("no")
    code, _, err = run("receipt", "verify", path)
    assert code == 2
    assert err.startswith("jaxsteer: ")
    assert err.count("\n") == 1
    assert run("receipt", tmp_path)[0] == 2


def test_results_that_are_not_there_exit_2(folder, tmp_path):
    build.write(folder)
    for wrong in (tmp_path / "none", tmp_path, folder / build.JSON):
        code, _, err = run("receipt", "verify", folder / build.JSON, "--results", wrong)
        assert code == 2
        assert err.startswith(f"jaxsteer: {wrong} holds no results")


def test_gates_give_ci_an_exit_code(folder, tmp_path):
    build.write(folder)
    build.write(made.folder(tmp_path / "b", label=lambda *of: "degenerate"))
    pair = folder / build.JSON, tmp_path / "b" / build.JSON
    code, out, _ = run("receipt", "diff", *pair)
    assert code == 0
    assert "moved down" in out
    code, out, _ = run("receipt", "diff", *pair, "--fail-if", "refusal drop > 0.05")
    assert code == 1
    assert "gate fires" in out
    assert run("receipt", "diff", *pair, "--fail-if", "refusal rise > 0.05")[0] == 0
    assert run("receipt", "diff", *pair, "--fail-if", "refusal sinks > 0.05")[0] == 2
    assert run("receipt", "diff", *pair, "--fail-if", "bypass rise > 0.05")[0] == 2


def test_a_receipt_beside_itself_and_a_study_without_claims_say_so(tmp_path):
    found = made.folder(tmp_path / "made", study=made.study(claims=[]))
    assert run("receipt", found)[1].startswith("made makes no claims")
    _, out, _ = run("receipt", "diff", found / build.JSON, found / build.JSON)
    assert out.startswith("other differences between the two: none")


def test_hostile_names_cannot_drive_the_terminal(tmp_path):
    study = made.study()
    value = msgspec.to_builtins(study)
    value["claim"][0]["name"] = HOSTILE
    value["about"] = HOSTILE
    found = made.folder(tmp_path / "made", study=msgspec.convert(value, type(study)))
    outputs = [run("receipt", found)]
    outputs.append(run("receipt", "verify", found / build.JSON, "--results", found))
    shutil.copy(found / build.JSON, tmp_path / "b.json")
    gate = f"refusal drop > 0.5 in {HOSTILE}"
    outputs.append(
        run("receipt", "diff", found / build.JSON, tmp_path / "b.json", "--fail-if", gate)
    )
    assert [code for code, _, _ in outputs] == [0, 0, 2]
    for _, out, err in outputs:
        assert "\x1b" not in out + err
        assert "\u202e" not in out + err


@pytest.mark.parametrize("name", ["[/x]", "[red]made", "a[link=http://x]b"])
def test_a_claims_name_is_not_read_as_markup(tmp_path, name):
    claims = [msgspec.structs.replace(made.CLAIMS[0], name=name)]
    code, out, err = run("receipt", made.folder(tmp_path / "made", study=made.study(claims=claims)))
    assert (code, err) == (0, "")
    assert name in out


def test_a_process_of_its_own_behaves_the_same(folder, tmp_path):
    build.write(folder, tmp_path)
    path = tmp_path / build.JSON
    path.write_text(path.read_text().replace('"k": 18', '"k": 17', 1))
    done = jaxsteer("receipt", "verify", path)
    assert (done.returncode, done.stderr) == (1, "")
    assert "does not match" in done.stdout
