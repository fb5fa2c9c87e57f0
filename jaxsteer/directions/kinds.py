"""Make a direction from the name a person gives: a trait, refusal, the assistant axis, random ones.

What is contrasted, and at which token, is in `directions`; here the material is looked up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from jaxsteer.data import prompts
from jaxsteer.data.prompts import Prompt
from jaxsteer.directions import direction
from jaxsteer.directions.activations import Position
from jaxsteer.directions.direction import Direction
from jaxsteer.errors import UserError
from jaxsteer.model.chat_model import ChatModel

# HarmBench and harmless prompts are ranked by this seed and taken from the front (see `setup`).
SPLIT_SEED = 11
RANDOM = r"random-([0-9]{1,18})"


def check(names: Sequence[str]) -> None:
    """Look up every trait that `named` will be asked for, before a model is loaded.

    Raises:
      UserError: no such trait, or one whose direction `--steer` could not name.
    """
    for name in names:
        if name not in ("assistant-axis", "refusal") and not re.fullmatch(RANDOM, name):
            trait = prompts.trait(name)
            if not re.fullmatch(direction.NAME, trait.name):
                raise UserError(
                    f"{name}: the trait's name {trait.name!r} would be its direction's; give it "
                    "letters, digits and . _ - only"
                )


def named(
    model: ChatModel,
    name: str,
    found: Mapping[str, Direction],
    *,
    position: Position = "prompt_end",
    policy: str = "safety-v2",
    seed: int = 0,
) -> Direction:
    """Make one direction.

    Args:
      model: the model to extract on.
      name: a shipped trait or a trait .toml; `refusal`; `assistant-axis`; or `random-SEED`.
      found: directions there already, of which `random-SEED` takes the first's norms.
      position: token of a trait.
      policy: name of the system prompt under which refusal is extracted.
      seed: of sampled replies.

    Raises:
      UserError: no such trait or policy, or nothing to take norms from.
    """
    if name == "assistant-axis":
        return assistant_axis(model, seed=seed)
    if name == "refusal":
        return refusal(model, policy, *refusal_prompts())
    match = re.fullmatch(RANDOM, name)
    if match:
        real = [d for d in found.values() if d.provenance.get("kind") != "random"]
        if not real:
            raise UserError(
                f"{name} takes the norms of another direction and there is none; name one before "
                "it, such as compliant"
            )
        return direction.random_like(real[0], int(match[1]))
    return direction.extract_trait(model, prompts.trait(name), [position], seed=seed)[position]


def assistant_axis(model: ChatModel, *, seed: int = 0) -> Direction:
    """The default assistant against our sixteen roles, averaged over sampled replies."""
    material = prompts.roles()
    roles = [(role["name"], role["instruction"]) for role in material["roles"]]
    return direction.extract_assistant_axis(
        model, material["default"], roles, material["questions"], seed=seed
    )


def refusal_prompts(count: int = 128, skip: int = 16) -> tuple[list[Prompt], list[Prompt]]:
    """The harmful and harmless prompts of the refusal direction, `count` of each.

    The first `skip` harmless ones are left out: the selection of its layer scores on them.
    """
    harmful = prompts.sample(prompts.harmbench(), count, SPLIT_SEED)
    return harmful, prompts.sample(prompts.harmless(), 0, SPLIT_SEED)[skip : skip + count]


def refusal(
    model: ChatModel, policy: str, harmful: Sequence[Prompt], harmless: Sequence[Prompt]
) -> Direction:
    """Harmful against harmless prompts, under the system prompt of that policy."""
    return direction.extract_contrast(
        model,
        "refusal",
        "refusal",
        [prompt.text for prompt in harmful],
        [prompt.text for prompt in harmless],
        prompts.policy(policy).text,
    )
