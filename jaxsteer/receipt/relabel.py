"""Labels that need no model, given anew: whether those in the results follow from the replies.

Every count of a receipt comes from labels, and whoever edits responses.parquet can write others
there and build a consistent receipt on them. The keyword list and the degenerate heuristic are at
hand, so what they said can be said again. What a judge model said cannot.
"""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from jaxsteer.judges import degenerate, keyword
from jaxsteer.judges.labels import label
from jaxsteer.judges.verdicts import text_hashes
from jaxsteer.study.results import Results

# A rule's name: its name and version, the word it finds, and how.
RULES = {
    keyword.NAME: (keyword.JUDGE, "refusal", keyword.is_refusal),
    degenerate.NAME: (degenerate.JUDGE, "degenerate", degenerate.is_degenerate),
}


def unearned(found: Results) -> Iterator[str]:
    """Rows whose label or verdict by a rule is not what the rule says of the reply.

    What another version of a rule said is left out. A row that no judge decided names no version,
    so at run time those are left out as well once another version decided some row.
    """
    given, by = _run_columns(found.rows)
    others = set(_others(found.rows[by]))
    skipped = {*others, ""} if others else others
    columns = found.rows.select("row_id", "family", "response", given, by)
    for row, family, response, said, judge in columns.iter_rows():
        if judge not in skipped and (said, judge) != label(response, family):
            yield f"{row} was labelled {said} by {judge or 'no judge'}; its reply says otherwise"
    hashes = pl.Series("response_sha256", text_hashes(found.rows["response"]), pl.String)
    replies = found.rows.select("row_id", "response", hashes)
    for name, (version, word, holds) in RULES.items():
        if name not in found.verdicts:
            continue
        table = found.verdicts[name].filter(pl.col("judge") == version)
        # A verdict on another text decides nothing, so it is not looked at.
        table = table.join(replies, on=["row_id", "response_sha256"], maintain_order="left")
        for row, verdict, response in table.select("row_id", "verdict", "response").iter_rows():
            if verdict is not None and (verdict == word) != holds(response):
                yield f"{row} is {verdict} in judges/{name}.parquet; its reply says otherwise"


def other_versions(found: Results) -> list[str]:
    """Who else labelled rows in a rule's name, at run time or later."""
    others = set(_others(found.rows[_run_columns(found.rows)[1]]))
    for name in RULES.keys() & found.verdicts.keys():
        others |= {str(by) for by in found.verdicts[name]["judge"]} - {RULES[name][0]}
    return sorted(others)


def _others(judges: pl.Series) -> list[str]:
    here = {version for version, _, _ in RULES.values()}
    return [by for by in judges.unique() if by.rpartition("-")[0] in RULES and by not in here]


def _run_columns(rows: pl.DataFrame) -> tuple[str, str]:
    # Rows that were labelled again keep what the run said beside it.
    return ("run_label", "run_judge") if "run_label" in rows.columns else ("label", "judge")
