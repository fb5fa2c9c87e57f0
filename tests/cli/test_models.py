"""convert, extract and generate as a user types them; bad input is one line and exit code 2."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsteer.data import prompts
from jaxsteer.directions import direction
from jaxsteer.directions.direction import Direction
from tests import tiny
from tests.cli.command import here, jaxsteer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    source = tiny.save(tiny.llama(), folder / "hf")
    done = here("convert", source, "--out", folder / "tiny")
    assert done.returncode == 0, done.stderr
    return folder / "tiny"


@pytest.fixture(scope="module")
def vectors(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "d.safetensors"
    for names in (["compliant", "random-3"], ["refusal"]):
        done = here("extract", *names, "--model", model, "--out", path)
        assert done.returncode == 0, done.stderr
    return path


def test_extract_adds_to_what_a_file_holds(vectors):
    found = direction.load(vectors)
    assert list(found) == ["compliant", "random-3", "refusal"]
    assert found["random-3"].provenance["norm_of"] == "compliant"


def test_a_direction_that_replaces_another_of_its_name_says_so(model, tmp_path):
    def extract(*options):
        asked = ("extract", "compliant", "--model", model, "--out", tmp_path / "d.safetensors")
        return here(*asked, *options).stdout

    first, again = extract(), extract()
    assert again == first and "; replaces" not in first
    other = extract("--position", "response_avg")
    digest = first.strip().rpartition(", ")[2]
    assert f"; replaces {digest}, made with another position, sampled, seed" in other


def test_a_trait_or_a_file_that_will_not_do_is_refused_before_a_model_is_loaded(tmp_path):
    nowhere = ("--model", tmp_path / "no-model")
    fine = ("--out", tmp_path / "d.safetensors")
    assert "no trait compliantt" in bad("extract", "refusal", "compliantt", *nowhere, *fine)
    text = (prompts.HERE / "traits/evil.toml").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(text.replace('"evil"', '"my evil"', 1))
    assert "cannot be named 'my evil'" in bad("extract", tmp_path / "mine.toml", *nowhere, *fine)
    (tmp_path / "file").touch()
    said = bad("extract", "refusal", *nowhere, "--out", tmp_path / "file/d.safetensors")
    assert "file/d.safetensors" in said and "choose another --out" in said
    assert "it is a folder" in bad("extract", "refusal", *nowhere, "--out", tmp_path)


def test_generate_prints_the_baseline_then_the_steered_reply_and_the_realised_change(
    model, vectors
):
    done = here(
        *("generate", "w4 w5", "--model", model, "--directions", vectors),
        *("--steer", "compliant@1x4", "--project", "compliant@2", "--max-new-tokens", 6),
    )
    assert done.returncode == 0, done.stderr
    words = ("baseline:", "steered:", "change at the steered layers:")
    heads = [done.stdout.index(word) for word in words]
    assert heads == sorted(heads)


def test_generate_says_how_many_control_tokens_of_a_prompt_were_broken_up(model):
    done = jaxsteer("generate", "w4 </s> <s>system", "--model", model, "--max-new-tokens", 2)
    assert done.returncode == 0
    assert "2 control tokens in the prompt were broken up" in done.stderr


def test_chat_template_shows_the_tokens_of_a_prompt_and_what_ends_a_reply(model):
    done = jaxsteer("chat-template", model, "w4 </s> w5", "--system", "w6")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    read = [line.split(maxsplit=2) for line in lines if "'" in line and line[4].isdigit()]
    ids = [int(words[1]) for words in read]
    assert ids == [1, 4, 12, 2, 1, 3, 10, *ids[7:-4], 11, 2, 1, 5]
    assert [words[2].endswith("prompt_end") for words in read] == [False] * (len(read) - 1) + [True]
    assert read[1][2] == "'system'"
    assert "a reply ends with: 2 '</s>'" in lines
    assert "1 control tokens in the prompt were broken up by a space" in lines


def test_a_hub_model_that_cannot_be_had_is_one_line(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    said = bad("convert", "some/model", "--out", tmp_path / "out", **offline)
    assert "cannot fetch some/model from the hub" in said and "attribute" not in said


def test_convert_takes_a_template_and_its_variables_and_says_what_is_unusual(tmp_path):
    source = tiny.save(tiny.llama(), tmp_path / "hf")
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0]['content'] }}{% if not think %} w9{% endif %}")
    asked = ("--chat-template", template, "--template-arg")
    done = jaxsteer("convert", source, "--out", tmp_path / "out", *asked, "think=False")
    assert done.returncode == 0, done.stderr
    assert "goes before the user's text" in done.stderr
    assert "keys of its config without effect: " in done.stderr
    shown = jaxsteer("chat-template", tmp_path / "out", "w4").stdout
    assert "'w9'  prompt_end" in shown and "think=False" in shown
    assert "goes before the user's text" in shown
    said = bad("convert", source, "--out", tmp_path / "out", *asked, "think")
    assert "--template-arg think has no value; write think=VALUE" in said


def test_generate_extracts_a_trait_the_first_time_and_says_so(model, tmp_path):
    asked = ("generate", "w4 w5", "--model", model, "--directions", tmp_path / "d.safetensors")
    asked += ("--steer", "compliant@1x4", "--max-new-tokens", 3)
    first, again = here(*asked), here(*asked)
    assert "extracting compliant" in first.stderr and "extracting" not in again.stderr
    assert first.stdout == again.stdout


def test_generate_runs_on_a_mesh(model):
    asked = ("generate", "w4 w5", "--model", model, "--max-new-tokens", 6)
    alone, spread = here(*asked), jaxsteer(*asked, "--mesh", "data=4,model=2", devices=8)
    assert spread.returncode == 0, spread.stderr
    assert spread.stdout == alone.stdout
    # Without an intervention one row runs, and one reply is printed.
    assert "baseline:" in alone.stdout and "steered:" not in alone.stdout


def bad(*arguments, **limits):
    done = jaxsteer(*arguments, **limits) if limits else here(*arguments)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    return lines[0]


def test_bad_input_is_one_line_that_names_the_thing_and_the_fix(model, vectors, tmp_path):
    held = vectors.read_bytes()
    here = ("--model", model, "--directions", vectors)
    assert f"no model {tmp_path}" in bad("generate", "w4", "--model", tmp_path)
    assert "resid_post.9" in bad("generate", "w4", *here, "--steer", "compliant@9x1")
    assert "no trait charm" in bad("generate", "w4", *here, "--steer", "charm@1x1")
    assert "NAME@LAYERxSCALE" in bad("generate", "w4", *here, "--steer", "compliant")
    assert "unknown scope" in bad("generate", "w4", *here, "--scope", "some")
    assert "prompt is empty" in bad("generate", "  ", *here)
    extract = ("--model", model, "--out", vectors)
    assert "no trait charm" in bad("extract", "charm", *extract)
    assert "unknown position" in bad("extract", "compliant", *extract, "--position", "middle")
    assert "no policy" in bad("extract", "refusal", *extract, "--policy", "none")
    trait = tmp_path / "mine.toml"
    trait.write_text('name = "mine"\n')
    assert "mine.toml" in bad("extract", trait, *extract)
    assert "no model at" in bad("convert", tmp_path / "nothing", "--out", tmp_path / "out")
    assert "File name too long" in bad("extract", "evil", *extract[:-1], "o" * 300)
    assert vectors.read_bytes() == held and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["generate", "convert"])
def test_a_device_that_is_not_there_is_one_line(model, tmp_path, command):
    told = {"generate": ("--model", model), "convert": ("--out", tmp_path / "out")}
    said = bad(command, "w4", *told[command], JAX_PLATFORMS="tpu_of_nobody")
    assert "JAX finds no device for JAX_PLATFORMS=tpu_of_nobody" in said


def test_a_seed_of_more_than_32_bits_is_refused_before_a_model_is_loaded(tmp_path):
    done = here("extract", "compliant", "--model", tmp_path, "--seed", 2**31)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Invalid value for '--seed'" in done.stderr


@pytest.mark.slow
def test_a_full_disk_while_extracting_is_one_line_and_keeps_the_old_file(model, vectors):
    held = vectors.read_bytes()
    said = bad("extract", "evil", "--model", model, "--out", vectors, file_limit=1000)
    assert f"cannot write {vectors}" in said and "free space" in said
    assert vectors.read_bytes() == held
    # Beside it there is only the lock, which stays.
    assert [path.name for path in vectors.parent.glob("[!.]*")] == [vectors.name]
    assert [path.suffix for path in vectors.parent.glob(".*")] == [".lock"]


def test_a_direction_of_another_models_width_is_refused(model, tmp_path):
    wide = Direction(name="v", vectors=np.ones((3, 99), np.float32), provenance={})
    direction.save(tmp_path / "d.safetensors", [wide])
    said = bad("generate", "w4", "--model", model, "--directions", tmp_path / "d.safetensors",
               "--steer", "v@1x1")  # fmt: skip
    assert "(3, 99)" in said and "(3, 32)" in said
