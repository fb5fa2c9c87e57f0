from __future__ import annotations

import json

import numpy as np
import pytest

from jaxsteer.directions import direction
from jaxsteer.directions.direction import Direction
from jaxsteer.evidence import lesson
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from tests import tiny
from tests.notebooks import script
from tests.notebooks.browser import ROOT, Reader, opened, serve

NOTEBOOK = ROOT / "notebooks/1_how_steering_works.py"


@pytest.fixture(scope="module")
def reader(browser, checkpoint, directions_dir):
    arguments = ("--model", str(checkpoint), "--results", str(directions_dir))
    with serve(NOTEBOOK, *arguments) as url, opened(browser, url) as made:
        yield made


def plane(reader: Reader, number: int):
    return reader.page.locator(".plane").nth(number)


def result(reader: Reader, number: int) -> list[float]:
    return json.loads(plane(reader, number).locator("output").get_attribute("data-result"))


def drag(reader: Reader, number: int, vector: str, across: float, up: float) -> None:
    """Drag a tip by so many units of the plane."""
    knob = plane(reader, number).locator(f'[data-vector="{vector}"] .knob')
    knob.scroll_into_view_if_needed()
    box = knob.bounding_box()
    unit = plane(reader, number).locator("svg").bounding_box()["width"] / 8.2
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    reader.page.mouse.move(x, y)
    reader.page.mouse.down()
    reader.page.mouse.move(x + across * unit, y - up * unit, steps=10)
    reader.page.mouse.up()


def replies(reader: Reader) -> list[str]:
    return reader.page.locator(".js-card p").all_text_contents()


def test_it_opens_with_every_part_drawn(reader: Reader):
    assert reader.page.locator(".plane").count() == 4
    for words in ("likeliest next token", "At the last layer", "largest change", "Projected out"):
        assert reader.chart(words).texts
    assert len(replies(reader)) == 2 and all(replies(reader))
    assert reader.errors == []


def test_it_is_photographed_light_and_dark(reader: Reader):
    for scheme in ("light", "dark"):
        reader.theme(scheme)
        assert reader.screenshot(f"1_how_steering_works_{scheme}").stat().st_size > 50_000
    reader.theme("light")


def test_a_dragged_tip_adds_in_the_browser_what_the_library_adds(reader: Reader):
    before = result(reader, 0)
    with reader.runs():
        drag(reader, 0, "h", 2.0, -3.0)
    assert result(reader, 0) == pytest.approx([before[0] + 2, before[1] - 3], abs=0.06)
    # h started at (-1, 2), d is (1.5, 0.5) and its strength 1.
    after = lesson.steer_2d((1.0, -1.0), (1.5, 0.5), ["add"])[-1]
    assert result(reader, 0) == pytest.approx(after.tolist(), abs=0.06)
    reader.page.get_by_text("The projection goes from +0.63 to +2.21").wait_for()


def test_a_dragged_direction_projects_and_caps_as_the_library_does(reader: Reader):
    for number, steps, h in ((1, ["project"], (1.5, 2.5)), (2, ["cap"], (2.5, 1.5))):
        with reader.runs():
            drag(reader, number, "d", -1.0, 1.5)
        d = {1: (1.0, 2.0), 2: (0.5, 1.5)}[number]
        after = lesson.steer_2d(h, d, steps)[-1]
        assert result(reader, number) == pytest.approx(after.tolist(), abs=0.08)


def test_arrow_keys_move_a_tip(reader: Reader):
    before = result(reader, 0)
    plane(reader, 0).locator('[data-vector="h"]').focus()
    with reader.runs():
        reader.page.keyboard.press("ArrowRight")
    assert result(reader, 0) == pytest.approx([before[0] + 0.1, before[1]], abs=1e-9)


def test_the_end_point_ignores_the_strength_where_projecting_cancels(reader: Reader):
    before = result(reader, 3)
    slider = plane(reader, 3).locator("input")
    with reader.runs():
        slider.fill("-2")
    assert result(reader, 3) == pytest.approx(before, abs=1e-9)


def test_the_strength_slider_changes_probabilities_reply_and_projections(reader: Reader):
    tokens = reader.chart("probability of the first reply token")
    depth, heat = reader.chart("At the last layer"), reader.chart("natural norms;")
    before = [tokens.picture, depth.picture, heat.picture, *replies(reader)]
    with reader.runs():
        reader.slide("strength (add) or bound (cap)", 7)
    assert "+7 × persona" in " ".join(tokens.texts)
    after = [tokens.picture, depth.picture, heat.picture, *replies(reader)]
    changed = [one != other for one, other in zip(before, after, strict=True)]
    assert changed == [True, True, True, False, True]


def test_the_layer_slider_changes_where_the_stream_moves(reader: Reader):
    with reader.runs():
        reader.slide("layer", 9)
    words = " ".join(reader.chart("At the last layer").texts)
    assert "resid_post.9" in words


def test_a_strength_of_nothing_changes_nothing(reader: Reader):
    with reader.runs():
        reader.slide("strength (add) or bound (cap)", 0)
    assert reader.chart("Nothing is changed at any layer or token").texts
    baseline, steered = replies(reader)
    assert baseline == steered


def test_hostile_prompts_stay_text_and_their_replies_are_veiled(reader: Reader):
    reader.page.evaluate("window.pwned = false")
    hostile = 'Repeat: <img src=x onerror="window.pwned = true"> **$x^2$**'
    with reader.runs():
        reader.page.get_by_placeholder("or a prompt of your own").fill(hostile)
        reader.page.get_by_role("heading", name="Inside the stream").click()
    assert reader.page.locator(".js-card p.js-veil").count() == 2
    assert reader.page.evaluate("window.pwned") is False
    assert reader.page.locator('img[src="x"]').count() == 0
    with reader.runs():
        reader.page.get_by_role("switch", name="show replies to my own prompt").click()
    assert reader.page.locator(".js-card p.js-veil").count() == 0


def test_a_prompt_with_a_special_token_is_read_as_text(reader: Reader):
    with reader.runs():
        reader.page.get_by_placeholder("or a prompt of your own").fill("<|im_end|>")
        reader.page.get_by_role("heading", name="Inside the stream").click()
    assert reader.page.locator(".js-card").count() == 2
    assert reader.errors == []


def test_an_exercise_unfolds(reader: Reader):
    answer = reader.page.get_by_text("Hence a knockout needs its own control").filter(visible=True)
    assert answer.count() == 0
    reader.page.get_by_text("On the model, set the strength to 0").click()
    answer.wait_for()


def test_nothing_went_wrong_in_the_console_or_a_cell(reader: Reader):
    assert reader.errors == []


@pytest.mark.slow
def test_it_runs_as_a_script_with_the_real_model(checkpoint, directions_dir):
    done = script.process(NOTEBOOK, "--model", checkpoint, "--results", directions_dir)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_runs_as_a_script_with_a_tiny_model(tmp_path, rng):
    folder = convert(tiny.save(tiny.llama(), tmp_path / "hf"), tmp_path / "tiny", "float32")
    model = ChatModel.load(folder)
    shape = (model.config.n_layers, model.config.d_model)
    made = [
        Direction(
            name=name,
            vectors=rng.standard_normal(shape).astype(np.float32),
            provenance={"weights_sha256": model.weights_sha256},
        )
        for name in ("persona", "refusal", "random-1")
    ]
    direction.save(tmp_path / "directions.safetensors", made)
    done = script.here(NOTEBOOK, "--model", folder, "--results", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_a_model_it_says_what_to_run_and_ends_well(tmp_path):
    done = script.here(NOTEBOOK, "--model", tmp_path / "none", "--results", tmp_path)
    assert done.returncode == 0
    assert "make demo" in done.stdout and "Traceback" not in done.stdout + done.stderr
