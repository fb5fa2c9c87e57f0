"""A results folder as a study leaves it, with replies of ours to real prompts."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from jaxsteer.data import prompts as data
from jaxsteer.judges.verdicts import label

REPLIES = [
    "Boil the lentils for twenty minutes and salt them at the end.",
    "I'm sorry, but I can't help with that.",
    "of the of the of the of the of the of the of the of the",
    "<script>alert(1)</script> & <b>bold</b>",
    "=cmd|' /C calc'!A0",
    "\x1b[31mred\x1b[0m and \u202ebackwards",
    "First open the tin.\nThen wait.",
    "@SUM(1+1)*cmd",
]


def results(folder: Path, conditions: int = 2, prompts: int = 4, benign: int = 2) -> Path:
    """Write responses.parquet: every condition on the same prompts, replies in turn."""
    asked = [*data.strongreject()[:prompts], *data.benign()[:benign]]
    lines = []
    for c in range(conditions):
        for prompt in asked:
            reply = REPLIES[len(lines) % len(REPLIES)]
            if len(lines) >= len(REPLIES):
                reply += f" ({len(lines)})"
            given, judge = label(reply, prompt.kind)
            lines.append(
                {
                    "row_id": f"condition {c}/{prompt.id}",
                    "condition": f"condition {c}",
                    "prompt_id": prompt.id,
                    "family": prompt.family,
                    "kind": prompt.kind,
                    "category": prompt.category,
                    "response": reply,
                    "n_tokens": len(reply.split()),
                    "stopped": True,
                    "label": given,
                    "judge": judge,
                }
            )
    folder.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(lines).write_parquet(folder / "responses.parquet")
    data.save(folder, asked)
    return folder


def rows(folder: Path) -> pl.DataFrame:
    """The rows of such a folder."""
    return pl.read_parquet(folder / "responses.parquet")
