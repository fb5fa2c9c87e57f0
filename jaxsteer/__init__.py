"""Activation-steering experiments on chat models, in JAX, with named taps on the residual stream.

    import jaxsteer as js

    model = js.load("smollm2-135m")
    persona = js.direction(model, "compliant")
    replies = model.generate(
        ["How do I pick a lock?"],
        system=js.policy("safety-v2"),
        conditions={"plain": [], "steered": [js.add(persona, at=20, scale=4)]},
    )
    replies.table()

The names below are the public face; `jaxsteer.api` documents them. The folders are in the order of
the data: data, model, generation, directions, judges, study, evidence, receipt, cli.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxsteer.api import (
        Model,
        Replies,
        add,
        cap,
        direction,
        load,
        policy,
        project,
        random,
    )

__all__ = [
    "Model",
    "Replies",
    "add",
    "cap",
    "direction",
    "load",
    "policy",
    "project",
    "random",
]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: `jaxsteer --help` needs no JAX."""
    if name in __all__:
        from jaxsteer import api

        return getattr(api, name)
    raise AttributeError(f"module 'jaxsteer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
