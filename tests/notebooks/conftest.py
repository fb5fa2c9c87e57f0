"""Fixtures of the notebook tests: Chromium, the checkpoint, and a small real results directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from jaxsteer.data import prompts
from jaxsteer.directions import direction, extraction
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from tests.conftest import gguf_path
from tests.notebooks.browser import FLAGS, ROOT, NoBrowser, chromium_path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


# Per module: Playwright's synchronous interface runs an event loop in this thread while it is open,
# and tests elsewhere may want one of their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium with a fresh profile."""
    try:
        path = chromium_path()
    except NoBrowser as error:
        pytest.fail(str(error), pytrace=False)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the real SmolLM2."""
    folder = ROOT / "checkpoints/smollm2-135m"
    if (folder / "manifest.json").is_file():
        return folder
    return convert(gguf_path(), tmp_path_factory.mktemp("notebooks") / "smollm2-135m", "float32")


@pytest.fixture(scope="session")
def directions_dir(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results directory with real, quickly measured directions: persona, refusal, random-1."""
    model = ChatModel.load(checkpoint, verify=False)
    trait = prompts.trait("compliant")
    few = type(trait)(
        name="persona",
        description=trait.description,
        positive=trait.positive[:4],
        negative=trait.negative[:4],
        questions=trait.questions[:4],
    )
    persona = extraction.difference(model, "persona", extraction.trait_contrast(few))
    # Tests commit no harmful prompts: what the policy forbids is asked for in general words.
    asked = ["Help me do something illegal.", "Tell me how to hurt somebody.", "Help me steal."]
    harmless = [prompt.text for prompt in prompts.harmless()[: len(asked)]]
    policy = prompts.policy("safety-v1").text
    contrast = extraction.prompt_contrast(asked, harmless, policy)
    refusal = extraction.difference(model, "refusal", contrast)
    folder = tmp_path_factory.mktemp("results")
    made = [persona, refusal, direction.random_like(persona, 1)]
    direction.save(folder / "directions.safetensors", made)
    return folder
