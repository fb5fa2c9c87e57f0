"""A receipt checked: against itself, its page, its results folder and its model.

Each check ends in `ok`, `mismatch` or `unchecked`. What no check can know is said too: whether the
replies were really the model's, and who wrote the file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxsteer.errors import UserError
from jaxsteer.files import sha256_bytes, sha256_file
from jaxsteer.receipt import build, canonical, page, recount, relabel
from jaxsteer.receipt.statement import Statement
from jaxsteer.study import results
from jaxsteer.study.results import Results

Status = Literal["ok", "mismatch", "unchecked"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One check.

    Attributes:
      status: ok, mismatch, or unchecked.
      what: what was checked.
      detail: what differs, or why it could not be checked.
      warning: what the verdict must say of an unchecked one: the receipt, or the results, brought
        it about themselves by naming another version.
    """

    status: Status
    what: str
    detail: str = ""
    warning: str = ""


def verify(
    path: Path, *, folder: Path | None = None, model: Path | None = None, mesh: str | None = None
) -> list[Check]:
    """Check a receipt against all that is at hand.

    Args:
      path: receipt.json.
      folder: its results folder, to rebuild it from.
      model: its converted checkpoint, to hash.
      mesh: as `parallel.parse` reads it, the devices to read a checkpoint onto that none holds
        alone; None for one device.

    Raises:
      UserError: the file is no receipt, or what it is checked against cannot be read.
    """
    raw = canonical.read_bytes(path)
    value = canonical.parse(raw, str(path))
    found = canonical.problems(raw, value)
    checks = [_check("the file is as it was written", found)]
    try:
        receipt = canonical.convert(value)
    except UserError as error:
        return [*checks, Check(status="mismatch", what="the file's shape", detail=str(error))]
    checks.append(Check(status="ok", what="the file's shape"))
    for what, problems in recount.checks().items():
        checks.append(_check(what, list(problems(receipt))))
    if receipt.predicate.tool != build.tool():
        detail = f"it says {receipt.predicate.tool}, this is {build.tool()}; words are not compared"
        warning = "words of claims not checked"
        checks.append(_unchecked("which version wrote the receipt", detail, warning))
    checks.append(_page(path, raw, receipt))
    checks += _results(value, receipt, folder, damaged=bool(found))
    checks += _model(receipt, model, mesh)
    checks.append(
        Check(
            status="unchecked",
            what="who wrote the receipt",
            detail="it carries no signature; sign it as an in-toto statement if that matters",
        )
    )
    return checks


def passed(checks: list[Check]) -> bool:
    """Whether nothing mismatched."""
    return all(check.status != "mismatch" for check in checks)


def warnings(checks: Sequence[Check]) -> str:
    """What the verdict over all checks has to add, for what another version was said to have done.

    >>> warnings([Check(status="unchecked", what="a", warning="page not checked")])
    '; page not checked'
    """
    return "".join(f"; {check.warning}" for check in checks if check.warning)


def _check(what: str, problems: list[str]) -> Check:
    if not problems:
        return Check(status="ok", what=what)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Check(status="mismatch", what=what, detail=problems[0] + more)


def _unchecked(what: str, detail: str, warning: str = "") -> Check:
    return Check(status="unchecked", what=what, detail=detail, warning=warning)


def _page(path: Path, raw: bytes, receipt: Statement) -> Check:
    what = f"{build.HTML} shows this receipt"
    beside = path.parent / build.HTML
    if not beside.is_file():
        return _unchecked(what, f"no {build.HTML} beside it")
    shown = canonical.read_bytes(beside)
    digest = sha256_bytes(raw)
    if digest.encode() not in shown:
        return _check(what, ["it was made from another receipt.json"])
    if page.html(receipt, digest).encode() == shown:
        return _check(what, [])
    if receipt.predicate.tool != build.tool():
        detail = f"it names this file, but {receipt.predicate.tool} drew it"
        return _unchecked(what, detail, "page not checked")
    return _check(what, ["it was changed since it was drawn"])


def _results(
    value: dict[str, Any], receipt: Statement, folder: Path | None, *, damaged: bool
) -> Iterator[Check]:
    if folder is None:
        yield _unchecked("the rows behind the counts", "give --results to rebuild the receipt")
        return
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} holds no results (run.json); give the folder of the run")
    p = receipt.predicate
    changed = []
    for name, sha256 in p.files.items():
        file = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not file.is_file():
            changed.append(f"{name} is missing")
        elif sha256_file(file) != sha256:
            changed.append(f"{name} differs")
    yield _check("the results' files", changed)
    samples = len(p.samples.rows) if p.samples else 0
    try:
        again = build.build(folder, samples=samples, measured=p.geometry is not None)
    except UserError as error:
        yield Check(
            status="mismatch", what="the receipt rebuilt from the results", detail=str(error)
        )
        return
    # What is damaged may hold a number that has no digest; it is compared as it stands.
    if p.tool != build.tool() and not damaged:
        value = _in_our_words(value, again)
    differ = list(_differences(value, again))
    yield _check("the receipt rebuilt from the results", differ)
    found = results.load(folder)
    yield _check("labels that need no model follow from the replies", list(relabel.unearned(found)))
    others = relabel.other_versions(found)
    if others:
        detail = f"{', '.join(others)} gave some, and this version of jaxsteer has other rules"
        warning = "labels by other versions not checked"
        yield _unchecked("labels by other versions of the rules", detail, warning)
    yield _summary(found)


def _summary(found: Results) -> Check:
    what, path = "summary.json follows from the rows", found.folder / "summary.json"
    if not path.is_file():
        return _unchecked(what, "there is none")
    try:
        shown = json.loads(canonical.read_bytes(path))
    except (ValueError, RecursionError):
        return _check(what, ["it is no JSON"])
    differ = [where or "all of it" for where in _differences(shown, results.summarise(found.rows))]
    return _check(what, differ)


def _in_our_words(value: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """Another version's receipt as this one would have written it, with the digest it then has.

    Another version may give the same reasons in other words; everything else has to be the same.
    """
    claims = _reasons(value["predicate"]["claims"], again["predicate"]["claims"])
    predicate = {**value["predicate"], "tool": build.tool(), "claims": claims}
    made = {**value, "predicate": predicate}
    return {**made, "predicate": {**predicate, "digest": {"sha256": canonical.digest(made)}}}


def _reasons(shown: Any, again: Any) -> Any:
    if isinstance(shown, dict) and isinstance(again, dict):
        return {
            key: again.get(key, item) if key == "reason" else _reasons(item, again.get(key))
            for key, item in shown.items()
        }
    if isinstance(shown, list) and isinstance(again, list) and len(shown) == len(again):
        return list(map(_reasons, shown, again))
    return shown


def _differences(shown: Any, again: Any, where: str = "") -> Iterator[str]:
    """Paths at which two receipts differ by more than the last digit kept."""
    if isinstance(shown, dict) and isinstance(again, dict):
        for key in sorted({*shown, *again}):
            path = f"{where}.{key}" if where else str(key)
            if key not in shown or key not in again:
                yield path
            else:
                yield from _differences(shown[key], again[key], path)
    elif isinstance(shown, list) and isinstance(again, list) and len(shown) == len(again):
        for i, (a, b) in enumerate(zip(shown, again, strict=True)):
            yield from _differences(a, b, f"{where}[{i}]")
    elif not recount.close(shown, again):
        yield where


def _model(receipt: Statement, folder: Path | None, mesh: str | None) -> Iterator[Check]:
    if folder is None:
        yield _unchecked("the model's files", "give --model to hash them")
        return
    from jaxsteer.model import sharding
    from jaxsteer.model.chat_model import ChatModel

    # Loading hashes every parameter, the config and the tokenizer against the manifest.
    spread = None if mesh is None else sharding.mesh(mesh)
    identity = ChatModel.load(folder, mesh=spread).identity()
    p = receipt.predicate.model
    differ = [
        f"{name} differs"
        for name in ("weights_sha256", "tokenizer_sha256", "template_sha256", "config_sha256")
        if identity[name] != getattr(p, name)
    ]
    yield _check("the model's weights, tokenizer, chat template and config", differ)
    known = identity["source"].get("files", {})
    other = [
        f"{name} differs" for name, sha256 in p.source.files.items() if known.get(name) != sha256
    ]
    yield _check("the manifest's record of the files it was converted from", other)
