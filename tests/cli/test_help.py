"""What the commands' help shows can be typed as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

from jaxsteer import cli


def test_the_examples_name_results_that_the_demo_makes():
    sources = [path.read_text() for path in Path(cli.__file__).parent.glob("*.py")]
    folders = re.findall(r"results/([\w-]+)(?=[/\s])", "".join(sources))
    assert set(folders) == {"smollm2-demo-smollm2-135m"}
