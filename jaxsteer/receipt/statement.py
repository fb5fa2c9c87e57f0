"""What a receipt says, and its bytes: the structs behind receipt.json, an in-toto Statement v1.

The statement's subjects are the model's files, by digest; its predicate is the study, its rates,
controls and claims. `json_schema` makes the JSON Schema from these structs. Every measured number
is rounded to six significant digits. A receipt holds no response; `samples`, when asked for, holds
redacted openings.

The file must equal the canonical text of its value. A changed byte therefore either breaks the
JSON, or keeps the value and breaks this equality, or changes the value and with it the digest,
which is taken over the canonical text without the digest. The digest shows damage and careless
edits. It is not a signature: it can be computed again after an edit. To sign a receipt, put the
file, which is an in-toto Statement, into a DSSE envelope.
"""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from jaxsteer.errors import UserError
from jaxsteer.evidence.claims import Claim, Power
from jaxsteer.evidence.comparisons import CosineAbove
from jaxsteer.evidence.controls import DoseResponse, PairedControl, RandomControl
from jaxsteer.evidence.outcomes import Impact, Share
from jaxsteer.evidence.reliability import WELL_KNOWN, Measurements
from jaxsteer.files import sha256_bytes
from jaxsteer.judges.human import Agreement
from jaxsteer.study import results
from jaxsteer.study.results import Count, Model, Part, Prompts, Sha256, Text
from jaxsteer.study.selection import Candidates
from jaxsteer.study.spec import DecodingSpec

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE: Final = "urn:jaxsteer:refusal-receipt:v4"
LARGEST = 64 * 2**20  # bytes


class Digest(Part, frozen=True):
    """An in-toto DigestSet with one algorithm."""

    sha256: Sha256


class Annotations(Part, frozen=True):
    """What a subject's digest was taken over."""

    over: str


class Subject(Part, frozen=True):
    """One artifact the statement is about: a file of the model, or an identity made of several.

    Attributes:
      name: unique; files of the source are `source/NAME`.
      digest: of the artifact.
      annotations: what exactly was hashed.
    """

    name: str
    digest: Digest
    annotations: Annotations


class SystemPrompt(Part, frozen=True):
    """The whole system prompt of one mode ("" without a mode): the mode's text, then the policy."""

    mode: str
    sha256: Sha256
    text: str


class Study(Part, frozen=True):
    """Which study: `key` is the run's identity, `spec_sha256` that of its specification."""

    name: str
    about: str
    key: Sha256
    spec_sha256: Sha256


class SplitHalf(Part, frozen=True):
    """How well a direction is known: two random halves of what it was made of, compared.

    Attributes:
      unit: what was halved, such as an instruction with all its questions.
      units: how many of them there are.
      mean: mean cosine of the two halves' directions, by layer.
    """

    unit: str
    units: Count
    mean: list[float]


class Direction(Part, frozen=True):
    """One direction: what made it, and the sha256 of its vectors.

    Attributes:
      name: as conditions use it.
      sha256: of shape and float32 bytes.
      kind: trait, refusal, assistant-axis, random and so on.
      tap: where in the residual stream.
      position: token whose state was averaged; "" where that makes no sense.
      source_sha256: of the prompts or the trait's instructions; "" where there are none.
      n_positive, n_negative: samples a side; 0 where there are none.
      split_half: how well it is known; null where it was not measured.
    """

    name: str
    sha256: Sha256
    kind: str
    tap: str = ""
    position: str = ""
    source_sha256: str = ""
    n_positive: Count = 0
    n_negative: Count = 0
    split_half: SplitHalf | None = None


class Steering(Part, frozen=True):
    """The set-up.

    Attributes:
      layers: named layers: block outputs, from 0.
      dose: in natural norms.
      residual_norm: mean norm of the stream after each layer, over the samples of a direction;
        empty where it was not recorded.
      directions: all that were run.
    """

    layers: dict[str, Count]
    dose: float
    residual_norm: list[Annotated[float, Meta(gt=0)]]
    directions: list[Direction]


class Rate(Part, frozen=True):
    """k of n with the Wilson 95 % interval."""

    k: Count
    n: Count
    rate: Share
    low: Share
    high: Share


class Leakage(Part, frozen=True):
    """Operational content in refused or degenerate replies: a score of 0 to 1 per scored row.

    Attributes:
      n: rows scored.
      mean, sd: of the scores.
      low, high: bootstrap 95 % interval of the mean.
    """

    n: Count
    mean: Share
    sd: float
    low: Share
    high: Share


class Outcomes(Part, frozen=True):
    """What became of one condition's prompts of one set.

    Attributes:
      n: rows.
      counts: by label; they add up to n.
      unjudged: rows of which no judge of harm knows whether they are a bypass.
      refusal, degenerate: rates.
      bypass: rate, or null as long as any row is unjudged.
      leakage: null where that judge did not run.
    """

    n: Count
    counts: dict[str, Count]
    unjudged: Count
    refusal: Rate
    degenerate: Rate
    bypass: Rate | None
    leakage: Leakage | None


class Change(Part, frozen=True):
    """What the interventions did to the residual stream.

    Attributes:
      steered_tokens: tokens times sites at which something changed, over all rows.
      mean: mean norm of the change per steered token and site.
      rows_unchanged: rows in which nothing changed.
    """

    steered_tokens: Annotated[int, Meta(ge=0)]
    mean: float
    rows_unchanged: Count


class Condition(results.Condition, frozen=True, kw_only=True):
    """One condition of the run record, and its results.

    Attributes:
      change: what its operations did to the residual stream.
      outcomes: by prompt set.
      impact: on benign prompts; null where it was not measured.
    """

    change: Change
    outcomes: dict[str, Outcomes]
    impact: Impact | None = None


class JudgeRecord(Part, frozen=True):
    """One judge that was run over the finished rows.

    Attributes:
      name: of its verdict file.
      versions: as it signs its verdicts.
      sha256: hashes of everything that can change a verdict (model, prompts, settings).
      n: rows it was given; unscored: of these, rows it could not score.
      file_sha256: of its verdict file.
      weights_sha256: of its checkpoint, if it is a model that ran here.
      threshold: a higher score of such a model is harmful; null where words decide.
    """

    name: str
    versions: list[str]
    sha256: list[str]
    n: Count
    unscored: Count
    file_sha256: Sha256
    weights_sha256: Sha256 | None = None
    threshold: float | None = None


class Judges(Part, frozen=True):
    """How the rows were labelled: `decided` counts rows by the judge that decided, "" is none."""

    decided: dict[str, Count]
    records: list[JudgeRecord]
    agreement: list[Agreement]


class Selection(Candidates, frozen=True):
    """How policy, layers and strengths were chosen, on prompts that are not reported on.

    Attributes:
      sha256: of setup.json.
    """

    sha256: Sha256


class Rows(Part, frozen=True):
    """The row table: its number of rows, and the hash over ids, replies, labels and judges."""

    n: Count
    sha256: Sha256


class Sample(Part, frozen=True):
    """One row with a redacted opening of its reply."""

    condition: str
    prompt_id: str
    family: str
    label: str
    judge: str
    response_sha256: Sha256
    excerpt: str


class Samples(Part, frozen=True):
    """Rows chosen by hash, not by hand; `rule` says how replies were redacted."""

    rule: str
    rows: list[Sample]


class Predicate(Part, frozen=True):
    """The receipt itself.

    Attributes:
      digest: sha256 of this file's text with this field left out.
      tool: what wrote it.
      date: when the run began (UTC).
      files: sha256 of the results folder's files.
      samples: null unless asked for.
      power: what each planned comparison could show at this size.
      geometry: how well the directions are known; null where `jaxsteer geometry` was not run.
    """

    digest: Digest
    tool: str
    date: str
    study: Study
    model: Model
    policy: Text
    modes: list[Text]
    system_prompts: list[SystemPrompt]
    steering: Steering
    decoding: DecodingSpec
    prompts: dict[str, Prompts]
    conditions: list[Condition]
    random_controls: list[RandomControl]
    paired_controls: list[PairedControl]
    dose_responses: list[DoseResponse]
    judges: Judges
    selection: Selection
    geometry: Measurements | None
    claims: list[Claim]
    power: list[Power]
    rows: Rows
    files: dict[str, Sha256]
    environment: dict[str, str]
    samples: Samples | None


class Statement(Part, frozen=True):
    """An in-toto Statement v1 whose predicate is a refusal receipt."""

    type: Literal["https://in-toto.io/Statement/v1"] = msgspec.field(name="_type")
    subject: Annotated[list[Subject], Meta(min_length=1)]
    predicateType: Literal["urn:jaxsteer:refusal-receipt:v4"]
    predicate: Predicate


def known(p: Predicate, claim: Claim) -> dict[tuple[str, int], float | None]:
    """The split-half cosines behind a claim: of each direction at the layer it was taken from.

    None where it was not measured. Random directions are left out, since nothing is to be known.
    """
    used: dict[tuple[str, int], None] = {}
    conditions = {c.name: c for c in p.conditions}
    for c in claim.comparisons:
        if isinstance(c, CosineAbove):
            used |= {(name, layer): None for name in (c.treated, c.control) for layer in c.cosines}
            continue
        for condition in (conditions.get(c.treated), conditions.get(c.control)):
            for op in condition.operations if condition else ():
                layers = op.layers[:1] if op.measured_at is None else (op.measured_at,)
                used |= {(op.direction, layer): None for layer in layers}
    halves = {d.name: d.split_half for d in p.steering.directions if d.kind != "random"}
    means = {name: half.mean if half else [] for name, half in halves.items()}
    return {
        (name, layer): means[name][layer] if layer < len(means[name]) else None
        for name, layer in used
        if name in means
    }


def poorly_known(cosine: float | None) -> bool:
    """Whether a direction is known so little that claims on it are marked."""
    return cosine is not None and cosine < WELL_KNOWN


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of receipt.json, as `jaxsteer receipt schema` prints it."""
    schema = msgspec.json.schema(Statement)
    for definition in schema["$defs"].values():
        definition["description"] = inspect.cleandoc(definition["description"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"{PREDICATE}:schema",
        "title": "jaxsteer refusal receipt",
        **schema,
    }


# -- Its bytes -------------------------------------------------------------------------------------


def canonical_text(value: Any) -> str:
    """The canonical text: indented, keys sorted, ASCII only, one newline at the end.

    ASCII only, so that no name in it can change a terminal's colours or text direction.

    Raises:
      ValueError: a number that is not finite.
    """
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n"


def digest(value: dict[str, Any]) -> str:
    """sha256 of the canonical text with `predicate.digest` left out."""
    predicate = {k: v for k, v in value["predicate"].items() if k != "digest"}
    return sha256_bytes(canonical_text({**value, "predicate": predicate}).encode())


def rounded(value: Any) -> Any:
    """The value with every float at six significant digits.

    Raises:
      UserError: a number that is not finite.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError("a number in these results is not finite; run the study again")
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def parse(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON value of a receipt file; its shape and digest are not checked here.

    Raises:
      UserError: not JSON, or JSON of something else.
    """
    try:
        value = json.loads(raw.decode("utf-8"), parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where} is not JSON ({first}); give an undamaged receipt.json") from None
    if not isinstance(value, dict) or value.get("_type") != STATEMENT:
        raise UserError(f"{where} is not an in-toto Statement v1; give a receipt.json")
    kind = str(value.get("predicateType"))
    if kind != PREDICATE or not isinstance(value.get("predicate"), dict):
        raise UserError(
            f"{where} is a statement of another kind or version ({kind[:60]!r}); give a receipt "
            "that this jaxsteer wrote, or verify it with the jaxsteer that wrote it"
        )
    return value


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise ValueError(f"the number {number[:20]} is not finite")
    return float(number)


def read_bytes(path: Path) -> bytes:
    """The file's bytes.

    Raises:
      UserError: missing, unreadable, or far too large.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} is larger than any receipt; give a receipt.json")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def problems(raw: bytes, value: dict[str, Any]) -> list[str]:
    """What is wrong with a receipt's own bytes; nothing for a file as it was written."""
    try:
        same, actual = canonical_text(value).encode() == raw, {"sha256": digest(value)}
    except RecursionError:
        return ["the content is nested too deeply for a receipt"]
    found = [] if same else ["the file is not the canonical text of its content"]
    if value["predicate"].get("digest") != actual:
        found.append("the content does not match its digest")
    return found


def convert(value: dict[str, Any]) -> Statement:
    """The value as structs.

    Raises:
      UserError: it is not shaped like a receipt, naming the place.
    """
    try:
        return msgspec.convert(value, Statement, str_keys=True)
    except (msgspec.ValidationError, OverflowError, RecursionError, UnicodeEncodeError) as error:
        raise UserError(f"not shaped like a receipt: {error}") from None


def load(path: Path) -> Statement:
    """An undamaged receipt.

    Raises:
      UserError: it cannot be read, or was changed since it was written.
    """
    raw = read_bytes(path)
    value = parse(raw, str(path))
    for problem in problems(raw, value):
        raise UserError(f"{path}: {problem}; it was changed, build it again")
    return convert(value)
