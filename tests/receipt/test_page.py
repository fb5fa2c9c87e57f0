"""The page: nothing but itself, nothing but text, and the same for the same receipt."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import subprocess
from html.parser import HTMLParser

import msgspec
import pytest
from playwright.sync_api import sync_playwright

from jaxsteer.receipt import build, page, statement
from tests.notebooks.browser import FLAGS, chromium_path
from tests.receipt import made

HOSTILE = (
    "<script>alert(1)</script> \x1b[31m\u202e =cmd|'/C calc'!A0 [x](javascript:alert(1)) &amp; "
    '{{ 7 * 7 }} " onload="alert(1)'
)
# Texts that a receipt's shape or the page's tables fix; every other text can hold anything.
FIXED = {
    *("confirmed", "not confirmed", "not testable", "not tested", "lower", "higher"),
    *("different", "few-raised", "beyond-random", "cosine-above", "not-tested", "held", "failed"),
    *("refusal", "bypass", "degenerate", "harmful", "incoherent"),
    *("neutral", "unsteered", "random", "benign", "strongreject"),
    *("add", "project", "cap", "resid_post", "all", "jaxsteer-geometry-2"),
    *("https://in-toto.io/Statement/v1", "urn:jaxsteer:refusal-receipt:v4"),
}


class Tags(HTMLParser):
    """Every element with its attributes, and all text."""

    def __init__(self, page):
        super().__init__()
        self.found, self.pieces = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.pieces.append(data)

    @property
    def text(self):
        return "".join(self.pieces)


@pytest.fixture(scope="module")
def drawn(finished):
    return (finished / build.HTML).read_text()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A receipt that has every part: modes, judges, leakage, geometry and samples."""
    folder = made.folder(tmp_path_factory.mktemp("full"), study=made.study(modes=["calm", "bold"]))
    made.judge(folder)
    made.measure(folder)
    build.write(folder, samples=30)
    return json.loads((folder / build.JSON).read_text())


def hostile(value):
    """The value with every text in it made hostile, so that equal names stay equal."""
    if isinstance(value, str):
        fixed = not value or value in FIXED or re.fullmatch("[0-9a-f]{64}", value)
        return value if fixed else f"{value}{HOSTILE}"
    if isinstance(value, list):
        return [hostile(item) for item in value]
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    return value


def elements(page):
    return {tag for tag, _ in Tags(page).found}


def test_a_page_loads_nothing_and_runs_nothing(drawn):
    tags = Tags(drawn)
    assert not elements(drawn) & {"script", "link", "img", "iframe", "object", "embed", "form", "a"}
    for tag, attributes in tags.found:
        assert not {"src", "href", "style", "srcset"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert "url(" not in drawn
    assert "@import" not in drawn
    assert not re.findall(r"https?://", drawn)


def test_its_security_policy_allows_its_own_style_and_nothing_else(drawn):
    [policy] = [
        attributes["content"]
        for tag, attributes in Tags(drawn).found
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    style = re.search(r"<style>(.*?)</style>", drawn, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")


def test_every_text_of_a_receipt_is_inert_on_the_page(full):
    value = hostile(full)
    predicate = value["predicate"]
    for names in (
        predicate["environment"],
        predicate["judges"]["decided"],
        predicate["steering"]["layers"],
        predicate["model"]["source"]["files"],
    ):
        for name in list(names):
            names[name + HOSTILE] = names.pop(name)
    plain = page.html(statement.convert(full), "0" * 64)
    shown = page.html(statement.convert(value), "0" * 64)
    # Element by element the same page: no text became an element or an attribute.
    assert [(tag, set(attributes)) for tag, attributes in Tags(shown).found] == [
        (tag, set(attributes)) for tag, attributes in Tags(plain).found
    ]
    assert "<script" not in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    text = Tags(shown).text
    assert text.count("<script>alert(1)</script> \\x1b[31m\\x202e =cmd") > 200
    assert text.count('&amp; {{ 7 * 7 }} " onload="alert(1)') > 200
    # Names of the environment, judges, layers and claims came through.
    for name in ("jaxsteer", "keyword-3", "steer", "suppression", "calm", "benign unharmed holds."):
        assert f"{name}<script>" in text


def test_what_was_asked_of_the_conversion_and_broken_tokens_are_on_the_page(full):
    value = copy.deepcopy(full)
    options = {"adapter": f"mine{HOSTILE}", "arguments": {"think": False}}
    value["predicate"]["model"]["source"]["options"] = options
    value["predicate"]["prompts"]["strongreject"]["broken_tokens"] = 3
    shown = page.html(statement.convert(value), "0" * 64)
    assert "<script" not in shown
    text = " ".join(" ".join(Tags(shown).pieces).split())
    assert ", adapter mine<script>" in text and "arguments {'think': False}" in text
    assert ", 3 control tokens broken up" in text


def test_measured_geometry_is_shown_at_the_studys_layers(full):
    text = " ".join(" ".join(Tags(page.html(statement.convert(full), "0" * 64)).pieces).split())
    assert "agreement of random halves layer 2 layer 3 persona, instruction +0.20 +0.30" in text
    assert "layer 2 layer 3 persona, refusal +0.20 (p 0.2) +0.30 (p 0.3)" in text


def test_agreement_on_refusals_stands_beside_the_headline_rate(drawn, full):
    none = "no sample was labelled by hand; no model has judged these replies a second time."
    assert f"Second labels: {none}" in " ".join(Tags(drawn).text.split())
    receipt = statement.convert(full)
    pair = statement.Agreement(
        question="refusal",
        first="keyword",
        second="human",
        both_yes=12,
        only_first=1,
        only_second=2,
        both_no=35,
        kappa=0.85,
    )
    judges = msgspec.structs.replace(receipt.predicate.judges, agreement=[pair])
    predicate = msgspec.structs.replace(receipt.predicate, judges=judges)
    shown = page.html(msgspec.structs.replace(receipt, predicate=predicate), "0" * 64)
    text = " ".join(Tags(shown).text.split())
    said = "keyword and human agree on 94 % of 50, kappa 0.85; no model has judged these"
    assert said in text and text.index(said) < text.index("What the model did")


def test_hostile_names_are_ascii_in_the_json(full):
    raw = statement.canonical_text(hostile(full)).encode()
    assert all(byte == 0x0A or 0x20 <= byte < 0x7F for byte in raw)


def test_every_claim_and_condition_is_on_the_page(drawn, finished):
    receipt = statement.load(finished / build.JSON).predicate
    pieces = [piece.strip() for piece in Tags(drawn).pieces]
    assert {f"{claim.name}." for claim in receipt.claims} <= set(pieces)
    # Repeats carry their strength or number of seeds behind the name.
    for condition in receipt.conditions:
        assert any(piece.startswith(condition.base) for piece in pieces)
    assert receipt.rows.sha256 in pieces


def test_the_page_leads_with_claims_confirmed_ones_first(drawn):
    verdicts = re.findall(r'class="verdict [\w-]+">. ([\w ]+)<', drawn)
    order = ["confirmed", "not confirmed", "not testable", "not tested"]
    assert verdicts == sorted(verdicts, key=order.index) and len(set(verdicts)) > 1
    assert drawn.index("Claims, fixed before the run") < drawn.index("What the model did")


def test_a_claim_that_could_not_be_tested_says_why(tmp_path):
    def refuses(condition, family, i):
        return "refusal"

    build.write(made.folder(tmp_path, label=refuses))
    text = " ".join(" ".join(Tags((tmp_path / build.HTML).read_text()).pieces).split())
    assert "○ not testable restoration." in text
    assert "it needs 'suppression', which is not confirmed" in text


def with_halves(finished, mean):
    """The receipt with a persona whose halves agree so far at every layer."""
    receipt = statement.load(finished / build.JSON)
    made = {"unit": "instruction", "units": 10, "mean": [mean] * made_layers(receipt)}
    directions = [
        msgspec.structs.replace(d, split_half=msgspec.convert(made, statement.SplitHalf))
        if d.name == "persona"
        else d
        for d in receipt.predicate.steering.directions
    ]
    steering = msgspec.structs.replace(receipt.predicate.steering, directions=directions)
    predicate = msgspec.structs.replace(receipt.predicate, steering=steering)
    return msgspec.structs.replace(receipt, predicate=predicate)


def made_layers(receipt):
    return len(receipt.predicate.steering.directions[0].split_half.mean)


def test_a_poorly_known_direction_is_marked_beside_each_claim_on_it(finished):
    poor = page.html(with_halves(finished, 0.22), "0" * 64)
    known = page.html(with_halves(finished, 0.5), "0" * 64)
    claims = len(statement.load(finished / build.JSON).predicate.claims)
    assert poor.count("persona at layer 3 +0.22 (poorly known)") == claims
    assert "(poorly known)" not in known and known.count("persona at layer 3 +0.50") == claims


def test_bars_join_seeds_and_fill_their_width(finished, drawn):
    receipt = statement.load(finished / build.JSON).predicate
    found = {bar.name: bar for bar in page.bars(receipt.conditions, "strongreject")}
    joined = found["random direction (3 seeds)"]
    assert (joined.low, joined.high) == (0.425, 0.425)
    pictures = re.findall(r'<svg viewBox="0 0 100 10".*?</svg>', drawn, re.S)
    assert len(pictures) == len(found)
    for picture in pictures:
        widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="10"', picture)]
        assert sum(widths) == pytest.approx(100, abs=0.05)


def test_several_modes_are_a_table_of_conditions_by_modes(tmp_path):
    build.write(made.folder(tmp_path, study=made.study(modes=["calm", "bold"])))
    pieces = [p.strip() for p in Tags((tmp_path / build.HTML).read_text()).pieces]
    at = pieces.index("refused by condition and mode")
    line = [piece for piece in pieces[at:] if piece][:6]
    assert line == ["refused by condition and mode", "calm", "bold", "baseline", "45 %", "45 %"]
    assert {"calm: baseline", "bold: baseline"} <= set(pieces)


def test_strengths_are_left_out_when_there_are_too_many_bars(finished):
    every = page.bars(statement.load(finished / build.JSON).predicate.conditions, "strongreject")
    assert page.chosen(every, len(every)) == every
    fewer = page.chosen(every, len(every) - 1)
    assert [bar.name for bar in every if bar not in fewer] == [
        f"persona by strength x{s}" for s in (1, 2, 4)
    ]


def test_a_condition_that_proves_nothing_is_marked_so(drawn):
    row = re.search(r"<tr><td class=\"label\">persona, out at steer.*?</tr>", drawn, re.S)[0]
    assert "proves nothing" in row


def test_the_colours_are_those_of_the_charts():
    from jaxsteer.evidence.charts.marks import PALETTE

    light = dict(re.findall(r"--(\w+): (#\w+);", page.STYLE.read_text().partition("@media")[0]))
    assert light["refusal"] == PALETTE["refusal"]
    assert light["bypass"] == PALETTE["persona"]
    assert light["degenerate"] == PALETTE["degenerate"]
    assert light["answer"] == PALETTE["axis"]


def test_a_long_table_says_how_much_it_leaves_out(finished):
    receipt = statement.load(finished / build.JSON)
    claims = receipt.predicate.claims * 7
    many = msgspec.structs.replace(receipt.predicate, claims=claims)
    shown = page.html(msgspec.structs.replace(receipt, predicate=many), "0" * 64)
    assert shown.count('<td><span class="verdict') == page.MOST
    assert f"{len(claims) - page.MOST} more in receipt.json" in shown


@pytest.mark.slow
def test_it_prints_on_two_pages_of_a4(finished, tmp_path):
    browser = chromium_path()
    target = tmp_path / "receipt.pdf"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer"]
    command += [f"--user-data-dir={tmp_path}/profile", f"--print-to-pdf={target}"]
    subprocess.run([*command, (finished / build.HTML).as_uri()], check=True, capture_output=True)
    pdf = target.read_bytes()
    pages = re.findall(rb"/Type\s*/Page\b", pdf)
    assert len(pages) in (1, 2)
    [left, bottom, right, top] = map(float, re.search(rb"/MediaBox\s*\[([^\]]+)\]", pdf)[1].split())
    assert (right - left, top - bottom) == pytest.approx((595, 842), abs=1)


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 900])
def test_it_fits_the_width_of_its_window(width, finished):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=list(FLAGS))
        opened = browser.new_page(viewport={"width": width, "height": 800})
        opened.goto((finished / build.HTML).as_uri())
        assert opened.evaluate("document.documentElement.scrollWidth") == width
        browser.close()
