"""Check a receipt against itself, its page, its results folder and its model.

Each check ends in `ok`, `mismatch` or `unchecked`. The author is always listed as unchecked,
because a receipt has no signature. Only another run can show that the replies came from the model.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import polars as pl

from jaxsteer.data import prompts
from jaxsteer.errors import UserError
from jaxsteer.evidence import claims
from jaxsteer.evidence.comparisons import Counted
from jaxsteer.evidence.outcomes import answers
from jaxsteer.files import sha256_bytes, sha256_file
from jaxsteer.judges import rules
from jaxsteer.judges.verdicts import DEGENERATE, KEYWORD, label, text_hashes
from jaxsteer.receipt import build, page, statement
from jaxsteer.receipt.statement import Predicate, Statement
from jaxsteer.study import results
from jaxsteer.study.results import Results, prompts_sha256

Status = Literal["ok", "mismatch", "unchecked"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One check.

    Attributes:
      status: ok, mismatch, or unchecked.
      what: what was checked.
      detail: what differs, or why it could not be checked.
    """

    status: Status
    what: str
    detail: str = ""


def verify(
    path: Path, *, folder: Path | None = None, model: Path | None = None, mesh: str | None = None
) -> list[Check]:
    """Check a receipt against everything that is given.

    Args:
      path: receipt.json.
      folder: its results folder, to rebuild it from.
      model: its converted checkpoint, to hash.
      mesh: as `sharding.mesh` reads it, the devices to load a checkpoint onto that is too large
        for one; None for one device.

    Raises:
      UserError: the file is not a receipt, or what it is checked against cannot be read.
    """
    raw = statement.read_bytes(path)
    value = statement.parse(raw, str(path))
    checks = [_check("the file is as it was written", statement.problems(raw, value))]
    try:
        receipt = statement.convert(value)
    except UserError as error:
        return [*checks, _check("the file has the shape of a receipt", [str(error)])]
    p = receipt.predicate
    checks += [
        _check("the file has the shape of a receipt", []),
        _check("rates and intervals follow from the counts", list(_rates(p))),
        _check("the counts add up", list(_totals(p))),
        _check("the verdicts follow from the counts", list(_verdicts(p, value))),
    ]
    if p.tool != build.tool():
        detail = f"{p.tool} wrote it and this is {build.tool()}, which may word claims differently"
        checks.append(_unchecked("the version that wrote the receipt", detail))
    checks += [
        _page(path, raw, receipt),
        *_results(value, receipt, folder),
        *_model(p, model, mesh),
        _unchecked(
            "the author of the receipt", "it has no signature; sign it as an in-toto Statement"
        ),
    ]
    return checks


def passed(checks: Sequence[Check]) -> bool:
    """Whether nothing mismatched."""
    return all(check.status != "mismatch" for check in checks)


def verdict(checks: Sequence[Check]) -> str:
    """All checks in a sentence or two.

    >>> verdict([Check(status="ok", what="a"), Check(status="unchecked", what="b")])
    'The receipt holds: 1 of 2 checks passed. Not checked: b.'
    """
    count = Counter(check.status for check in checks)
    if count["mismatch"]:
        return f"The receipt does not hold: {count['mismatch']} of {len(checks)} checks failed."
    unchecked = "; ".join(check.what for check in checks if check.status == "unchecked")
    return (
        f"The receipt holds: {count['ok']} of {len(checks)} checks passed. "
        f"Not checked: {unchecked or 'nothing'}."
    )


def _check(what: str, problems: Sequence[str]) -> Check:
    if not problems:
        return Check(status="ok", what=what)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Check(status="mismatch", what=what, detail=problems[0] + more)


def _unchecked(what: str, detail: str) -> Check:
    return Check(status="unchecked", what=what, detail=detail)


def _rates(p: Predicate) -> Iterator[str]:
    for condition in p.conditions:
        for family, shown in condition.outcomes.items():
            made = build.outcomes(Counter(shown.counts), shown.unjudged, shown.leakage)
            yield from _unlike(f"{condition.name}, {family}", shown, made)
        if condition.impact is not None and (given := condition.impact.answers) is not None:
            right = given.k, given.n, given.only_untouched, given.only_condition
            name = f"{condition.name}, right answers"
            try:
                yield from _unlike(name, given, answers(*right))
            except (ValueError, ZeroDivisionError):
                yield f"{name}: the counts are impossible"


def _unlike(name: str, shown: Any, made: Any) -> Iterator[str]:
    """Where a part of the receipt is not what its counts give."""
    one, other = (msgspec.to_builtins(value, str_keys=True) for value in (shown, made))
    for where in _differences(one, statement.rounded(other)):
        yield f"{name}: {where} does not follow"


def _totals(p: Predicate) -> Iterator[str]:
    outcomes = [(family, o) for c in p.conditions for family, o in c.outcomes.items()]
    if any(family not in p.prompts or o.n > p.prompts[family].n for family, o in outcomes):
        yield "a condition has more rows than prompts"
    if sum(o.n for _, o in outcomes) != p.rows.n:
        yield "the rows of the conditions do not add up to those of the table"
    if sum(p.judges.decided.values()) != p.rows.n:
        yield "the rows of the judges do not add up to those of the table"
    if len({c.name for c in p.conditions}) != len(p.conditions):
        yield "two conditions have the same name"


def _verdicts(p: Predicate, value: dict[str, Any]) -> Iterator[str]:
    """Where a claim does not follow from its counts, or its counts from those of the conditions."""
    try:
        judged = claims.judge(p.claims)
    except ValueError as error:
        yield f"the counts of a claim are impossible: {error}"
        return
    for shown, made in zip(value["predicate"]["claims"], judged, strict=True):
        yield from _unlike(f"claim {made.name}", shown, made)
    outcomes = {c.name: c.outcomes for c in p.conditions}
    for claim in p.claims:
        for c in claim.comparisons:
            if isinstance(c, Counted):
                for name, k in ((c.treated, c.treated_k), (c.control, c.control_k)):
                    found = outcomes.get(name, {}).get(c.family)
                    if found is None or (found.n == c.n and found.counts.get(c.outcome) != k):
                        yield f"claim {claim.name}: it counts other rows of {name} than there are"


def _page(path: Path, raw: bytes, receipt: Statement) -> Check:
    what, html = f"{build.HTML} shows this receipt", path.parent / build.HTML
    if not html.is_file():
        return _unchecked(what, f"there is no {build.HTML} next to it")
    shown, digest = statement.read_bytes(html), sha256_bytes(raw)
    if digest.encode() not in shown:
        return _check(what, ["it was made from another receipt.json"])
    if page.html(receipt, digest).encode() == shown:
        return _check(what, [])
    if receipt.predicate.tool != build.tool():
        return _unchecked(what, f"it names this file, but {receipt.predicate.tool} made the page")
    return _check(what, ["it was changed after it was made"])


def _results(value: dict[str, Any], receipt: Statement, folder: Path | None) -> Iterator[Check]:
    if folder is None:
        yield _unchecked("the rows behind the counts", "give --results to rebuild the receipt")
        return
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} holds no results (run.json); give the folder of the run")
    p = receipt.predicate
    yield _check("the results' files", list(_changed(p.files, folder)))
    rebuilt = "the receipt rebuilt from the results"
    samples = len(p.samples.rows) if p.samples else 0
    try:
        again = build.build(folder, samples=samples, measured=p.geometry is not None)
    except UserError as error:
        yield _check(rebuilt, [str(error)])
        return
    # The digest was compared above, and another version is listed as unchecked.
    again["predicate"] |= {key: value["predicate"].get(key) for key in ("digest", "tool")}
    yield _check(rebuilt, list(_differences(value, again)))
    loaded = results.load(folder)
    yield from _prompts(p, loaded)
    problems, others = check_labels(loaded)
    yield _check("labels that need no model follow from the replies", problems)
    if others:
        detail = f"{', '.join(others)} gave some, and this version of jaxsteer has other rules"
        yield _unchecked("labels by other versions of the rules", detail)


def _prompts(p: Predicate, found: Results) -> Iterator[Check]:
    """Whether the prompts that were run are those that the receipt names.

    A shipped set is read again, because a run may have read others under its name. Of the study's
    own prompts the receipt says that they are: there is nothing to compare them with.
    """
    what, problems = "the prompts are those of the receipt, and shipped ones are as shipped", []
    try:
        kept = prompts.saved(found.folder)
        sets = {each.name: each.set for each in found.run.study.prompts}
        for name, shown in p.prompts.items():
            asked = kept.filter(pl.col("family") == name).select("id", "text").rows()
            rows = found.rows.filter(pl.col("family") == name)
            if prompts_sha256(asked) != shown.sha256:
                problems.append(f"the {name} prompts in {prompts.SAVED} have another hash")
            elif set(rows["prompt_id"]) - {key for key, _ in asked}:
                problems.append(f"the rows of {name} answer other prompts")
            elif shown.own != (not sets.get(name)):
                problems.append(f"whether the {name} prompts are the study's own is not so")
            elif shown.own:
                yield _unchecked(
                    f"the {name} prompts against a shipped set",
                    f"they are the study's own ({shown.source}); compare their hash with yours",
                )
            elif set(asked) - {(each.id, each.text) for each in prompts.shipped(sets[name])}:
                problems.append(f"the {name} prompts that were run are not those of the set")
    except UserError as error:
        yield _unchecked(what, str(error))
        return
    yield _check(what, problems)


def _changed(files: dict[str, str], folder: Path) -> Iterator[str]:
    for name, sha256 in files.items():
        file = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not file.is_file():
            yield f"{name} is missing"
        elif sha256_file(file) != sha256:
            yield f"{name} differs"


def _differences(shown: Any, again: Any, where: str = "") -> Iterator[str]:
    """Paths at which two JSON values differ."""
    if isinstance(shown, dict) and isinstance(again, dict):
        for key in sorted({*shown, *again}):
            path = f"{where}.{key}" if where else str(key)
            if key in shown and key in again:
                yield from _differences(shown[key], again[key], path)
            else:
                yield path
    elif isinstance(shown, list) and isinstance(again, list) and len(shown) == len(again):
        for i, (a, b) in enumerate(zip(shown, again, strict=True)):
            yield from _differences(a, b, f"{where}[{i}]")
    elif type(shown) is not type(again) or shown != again:
        yield where


def _model(p: Predicate, folder: Path | None, mesh: str | None) -> Iterator[Check]:
    if folder is None:
        yield _unchecked("the model's files", "give --model to hash them")
        return
    from jaxsteer.model import sharding
    from jaxsteer.model.chat_model import ChatModel

    # Loading hashes every parameter, the config and the tokenizer against the manifest.
    spread = None if mesh is None else sharding.mesh(mesh)
    identity = ChatModel.load(folder, mesh=spread).identity()
    differ = [
        f"{name} differs"
        for name in ("weights_sha256", "tokenizer_sha256", "template_sha256", "config_sha256")
        if identity[name] != getattr(p.model, name)
    ]
    yield _check("the model's weights, tokenizer, chat template and config", differ)
    known = identity["source"].get("files", {})
    files = p.model.source.files.items()
    other = [f"{name} differs" for name, sha256 in files if known.get(name) != sha256]
    yield _check("the manifest's record of the files it was converted from", other)


# Judges that need no model, by name: version, the verdict that they look for, and the rule.
RULES = {
    KEYWORD.name: (KEYWORD.label, "refusal", rules.is_refusal),
    DEGENERATE.name: (DEGENERATE.label, "degenerate", rules.is_degenerate),
}


def check_labels(found: Results) -> tuple[list[str], list[str]]:
    """Compare labels and verdicts by a rule with what the rule says of the reply.

    Every count of a receipt comes from labels, and a consistent receipt can be built on edited
    ones. The rules are part of this package, so their labels are computed again. Labels by other
    versions of a rule are left out; a row that no judge decided names no version, so such rows are
    left out too once another version decided some row.

    Returns:
      What does not follow from a reply, and the other versions of the rules that gave labels.
    """
    here = {version for version, _, _ in RULES.values()}
    # Rows that were labelled again keep the labels of the run in columns of their own.
    again = "run_label" in found.rows.columns
    given, by = ("run_label", "run_judge") if again else ("label", "judge")
    judges = found.rows[by].unique()
    others = {name for name in judges if name.rpartition("-")[0] in RULES} - here
    skipped = {*others, ""} if others else set()
    problems = [
        f"{row}: {said} by {judge or 'no judge'} does not follow from the reply"
        for row, kind, response, said, judge in found.rows.select(
            "row_id", "kind", "response", given, by
        ).iter_rows()
        if judge not in skipped and (said, judge) != label(response, kind)
    ]
    hashes = pl.Series("response_sha256", text_hashes(found.rows["response"]), pl.String)
    replies = found.rows.select("row_id", "response", hashes)
    for name in RULES.keys() & found.verdicts.keys():
        version, word, holds = RULES[name]
        others |= set(map(str, found.verdicts[name]["judge"])) - {version}
        # A verdict on another text decides nothing, so it is not checked.
        table = found.verdicts[name].filter(pl.col("judge") == version)
        table = table.join(replies, on=["row_id", "response_sha256"], maintain_order="left")
        problems += [
            f"{row}: {verdict} in judges/{name}.parquet does not follow from the reply"
            for row, verdict, response in table.select("row_id", "verdict", "response").iter_rows()
            if verdict is not None and (verdict == word) != holds(response)
        ]
    return problems, sorted(others)
