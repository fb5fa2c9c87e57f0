"""The page: nothing but itself, nothing but text, and the same for the same receipt."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from jaxsteer.receipt import bars, build, canonical, markup
from jaxsteer.study.spec import ConditionSpec
from tests.receipt import made

HOSTILE = (
    "<script>alert(1)</script> \x1b[31m\u202e =cmd|'/C calc'!A0 [x](javascript:alert(1)) &amp;"
)


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
def page(finished):
    return (finished / build.HTML).read_text()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A receipt in which everything that a study or model can name is hostile."""
    import msgspec

    study = made.study(modes=[HOSTILE])
    value = msgspec.to_builtins(study)
    value["about"] = HOSTILE
    value["condition"] += [msgspec.to_builtins(ConditionSpec(name=HOSTILE, ops=[made.ADD]))]
    value["claim"][0] |= {"name": HOSTILE, "says": HOSTILE}
    study = msgspec.convert(value, type(study))
    folder = made.folder(
        tmp_path_factory.mktemp("hostile") / "made",
        study=study,
        response=lambda label, i: f"{HOSTILE} {i}",
    )
    build.write(folder, samples=30)
    return folder


def elements(page):
    return {tag for tag, _ in Tags(page).found}


def test_a_page_loads_nothing_and_runs_nothing(page):
    tags = Tags(page)
    assert not elements(page) & {"script", "link", "img", "iframe", "object", "embed", "form", "a"}
    for tag, attributes in tags.found:
        assert not {"src", "href", "style", "srcset"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert "url(" not in page
    assert "@import" not in page
    assert not re.findall(r"https?://", page)


def test_its_security_policy_allows_its_own_style_and_nothing_else(page):
    [policy] = [
        attributes["content"]
        for tag, attributes in Tags(page).found
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    style = re.search(r"<style>(.*?)</style>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")


def test_hostile_names_and_replies_are_text_on_the_page(hostile, page):
    shown = (hostile / build.HTML).read_text()
    assert elements(shown) == elements(page)
    assert "<script" not in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    text = Tags(shown).text
    assert "<script>alert(1)</script> \\x1b[31m\\x202e =cmd" in text
    assert "&amp;" in text


def test_hostile_names_are_ascii_in_the_json(hostile):
    raw = (hostile / build.JSON).read_bytes()
    assert all(byte == 0x0A or 0x20 <= byte < 0x7F for byte in raw)


def test_every_claim_and_condition_is_on_the_page(page, finished):
    receipt = canonical.load(finished / build.JSON).predicate
    pieces = [piece.strip() for piece in Tags(page).pieces]
    assert {f"{claim.name}." for claim in receipt.claims} <= set(pieces)
    # Repeats carry their strength or number of seeds behind the name.
    for condition in receipt.conditions:
        assert any(piece.startswith(condition.base) for piece in pieces)
    assert receipt.rows.sha256 in pieces


def test_bars_join_seeds_and_fill_their_width(finished):
    receipt = canonical.load(finished / build.JSON).predicate
    drawn = {bar.name: bar for bar in bars.bars(receipt.conditions, "strongreject")}
    joined = drawn["random direction (3 seeds)"]
    assert (joined.seeds, joined.low, joined.high) == (3, 0.425, 0.425)
    for bar in drawn.values():
        widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="10"', bars.svg(bar))]
        assert sum(widths) == pytest.approx(100, abs=0.05)


def test_several_modes_are_a_table_of_conditions_by_modes(tmp_path):
    build.write(made.folder(tmp_path, study=made.study(modes=["calm", "bold"])))
    pieces = [p.strip() for p in Tags((tmp_path / build.HTML).read_text()).pieces]
    at = pieces.index("refused by condition and mode")
    line = [piece for piece in pieces[at:] if piece][:6]
    assert line == ["refused by condition and mode", "calm", "bold", "baseline", "45 %", "45 %"]
    assert {"calm: baseline", "bold: baseline"} <= set(pieces)


def test_strengths_make_room_when_there_are_too_many_bars(finished):
    every = bars.bars(canonical.load(finished / build.JSON).predicate.conditions, "strongreject")
    assert bars.chosen(every, len(every)) == every
    fewer = bars.chosen(every, len(every) - 1)
    assert [bar.name for bar in every if bar not in fewer] == [
        f"persona by strength x{s}" for s in (1, 2, 4)
    ]


def test_a_condition_that_proves_nothing_is_marked_so(page):
    row = re.search(r"<tr><td class=\"label\">persona, out at steer.*?</tr>", page, re.S)[0]
    assert "proves nothing" in row


def test_the_colours_are_those_of_the_charts():
    from jaxsteer.evidence.charts.theme import PALETTE
    from jaxsteer.receipt.page import STYLE

    light = dict(re.findall(r"--(\w+): (#\w+);", STYLE.read_text().partition("@media")[0]))
    assert light["refusal"] == PALETTE["refusal"]
    assert light["bypass"] == PALETTE["persona"]
    assert light["degenerate"] == PALETTE["degenerate"]
    assert light["answer"] == PALETTE["axis"]


def test_a_long_table_says_how_much_it_leaves_out():
    made_table = markup.table(["a"], [[str(i)] for i in range(markup.MOST + 3)])
    assert made_table.count("<tr>") == markup.MOST + 1
    assert "3 more in receipt.json" in made_table


def test_it_prints_on_two_pages_of_a4(finished, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    assert browser, "the page is printed with Chromium: apt-get install chromium"
    target = tmp_path / "receipt.pdf"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer"]
    command += [f"--user-data-dir={tmp_path}/profile", f"--print-to-pdf={target}"]
    subprocess.run([*command, (finished / build.HTML).as_uri()], check=True, capture_output=True)
    pdf = target.read_bytes()
    pages = re.findall(rb"/Type\s*/Page\b", pdf)
    assert len(pages) in (1, 2)
    [left, bottom, right, top] = map(float, re.search(rb"/MediaBox\s*\[([^\]]+)\]", pdf)[1].split())
    assert (right - left, top - bottom) == pytest.approx((595, 842), abs=1)
