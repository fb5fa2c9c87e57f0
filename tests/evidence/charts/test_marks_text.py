from __future__ import annotations

from html.parser import HTMLParser

import marimo as mo
import pytest

from jaxsteer.evidence.charts import marks

HOSTILE = '<img src=x onerror=alert(1)></p><script>x</script> **bold** $x^2$ `code` "\x1b[31m\u202e'


class Seen(HTMLParser):
    """Tags and text of a document, as a browser's parser splits them."""

    def __init__(self, document: str):
        super().__init__()
        self.tags: list[str] = []
        self.words = ""
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.words += data


def test_a_reply_in_a_card_is_text_and_nothing_else():
    seen = Seen(marks.card("baseline", HOSTILE, "baseline"))
    assert seen.tags == ["div", "h4", "p"]
    assert "<script>x</script> **bold** $x^2$" in seen.words
    assert "\x1b" not in seen.words and "\u202e" not in seen.words


def test_the_title_of_a_card_is_text_too():
    assert Seen(marks.card(HOSTILE, "x", "persona")).tags == ["div", "h4", "p"]


@pytest.mark.parametrize("veiled", [True, False])
def test_a_veil_is_there_when_asked_for(veiled):
    made = marks.cards(marks.card("steered", "words", "persona", veiled=veiled), note="<i>")
    assert ('class="js-veil"' in made) is veiled
    assert "&lt;i&gt;" in made


def test_escaped_text_stays_text_inside_markdown():
    seen = Seen(mo.md(f"before {marks.escaped(HOSTILE)} after").text)
    assert not {"img", "script", "strong", "em", "code", "marimo-tex"} & set(seen.tags)
    assert "**bold** $x^2$ `code`" in seen.words
