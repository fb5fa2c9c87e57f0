"""The rows to run and the vectors to steer with, in files that any library can read.

job.json holds the rows and where each vector goes, vectors.npz the vectors. No pickle.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """What one condition does at one place of the residual stream, on every token.

    Attributes:
      tap: `embed`, `resid_mid` or `resid_post`.
      layer: 0-based block (0 for `embed`).
      added: vectors to add, strength included.
      removed: directions whose span is removed afterwards, of any length.
    """

    tap: str
    layer: int
    added: list[np.ndarray]
    removed: list[np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A study's rows.

    Attributes:
      tokens: prompt ids of each row.
      condition: each row's condition, a number.
      conditions: the sites of each condition; an empty list steers nothing.
      max_new_tokens: longest reply.
      eos: ids that end a reply and are no part of it.
      batch: rows that jaxsteer decodes together in this study.
    """

    tokens: list[list[int]]
    condition: list[int]
    conditions: list[list[Site]]
    max_new_tokens: int
    eos: list[int]
    batch: int

    def save(self, folder: Path) -> None:
        """Write job.json and vectors.npz."""
        vectors: list[np.ndarray] = []

        def number(some: Sequence[np.ndarray]) -> list[int]:
            vectors.extend(np.asarray(v, np.float32) for v in some)
            return list(range(len(vectors) - len(some), len(vectors)))

        written: dict[str, Any] = dataclasses.asdict(dataclasses.replace(self, conditions=[])) | {
            "conditions": [
                [
                    {
                        "tap": site.tap,
                        "layer": site.layer,
                        "added": number(site.added),
                        "removed": number(site.removed),
                    }
                    for site in sites
                ]
                for sites in self.conditions
            ]
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(json.dumps(written))
        np.savez(folder / "vectors.npz", vectors=np.stack(vectors or [np.zeros(1, np.float32)]))

    @classmethod
    def load(cls, folder: Path) -> Job:
        """Read what `save` wrote."""
        written = json.loads((folder / "job.json").read_text())
        with np.load(folder / "vectors.npz", allow_pickle=False) as held:
            vectors = held["vectors"]
        conditions = [
            [
                Site(
                    tap=site["tap"],
                    layer=site["layer"],
                    added=[vectors[v] for v in site["added"]],
                    removed=[vectors[v] for v in site["removed"]],
                )
                for site in sites
            ]
            for sites in written.pop("conditions")
        ]
        return cls(**written, conditions=conditions)

    def batches(self, rows: Sequence[int], size: int) -> list[list[int]]:
        """Rows cut into batches of one condition each, prompts of like length together."""
        found = []
        for condition in dict.fromkeys(self.condition[row] for row in rows):
            members = sorted(
                (row for row in rows if self.condition[row] == condition),
                key=lambda row: len(self.tokens[row]),
            )
            found += [members[start : start + size] for start in range(0, len(members), size)]
        return found
