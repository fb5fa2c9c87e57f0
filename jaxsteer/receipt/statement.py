"""What a receipt says: the structs behind receipt.json, an in-toto Statement v1.

The statement's subjects are the model's files, by digest; its predicate is the study, its rates,
controls and claims. `json_schema` makes the JSON Schema from these structs. Every measured number
is rounded to six significant digits. A receipt holds no response; `samples`, when asked for, holds
redacted openings.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from jaxsteer.evidence.claims import Claim
from jaxsteer.evidence.controls import (
    DoseResponse,
    PairedControl,
    RandomControl,
    Share,
)
from jaxsteer.evidence.reliability import Measurements
from jaxsteer.study import record
from jaxsteer.study.record import Count, Model, Part, Prompts, Sha256, Text
from jaxsteer.study.spec import DecodingSpec

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE: Final = "urn:jaxsteer:refusal-receipt:v2"


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
    """

    name: str
    sha256: Sha256
    kind: str
    tap: str = ""
    position: str = ""
    source_sha256: str = ""
    n_positive: Count = 0
    n_negative: Count = 0


class Steering(Part, frozen=True):
    """The set-up: named layers (block outputs, from 0), the dose in natural norms, directions."""

    layers: dict[str, Count]
    dose: float
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
    """What became of one condition's prompts of one family.

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


class Condition(record.Condition, frozen=True):
    """One condition of the run record, and its results.

    Attributes:
      change: what its operations did to the residual stream.
      outcomes: by prompt family.
    """

    change: Change
    outcomes: dict[str, Outcomes]


class JudgeRecord(Part, frozen=True):
    """One judge that was run over the finished rows.

    Attributes:
      name: of its verdict file.
      versions: as it signs its verdicts.
      sha256: hashes of everything that can change a verdict (model, prompts, settings).
      n: rows it was given; unscored: of these, rows it could not score.
      file_sha256: of its verdict file.
    """

    name: str
    versions: list[str]
    sha256: list[str]
    n: Count
    unscored: Count
    file_sha256: Sha256


class Agreement(Part, frozen=True):
    """Two judges on the rows that both scored.

    Attributes:
      question: what both answered with yes or no.
      first, second: the judges.
      both_yes, only_first, only_second, both_no: rows by the judges that said yes.
      kappa: Cohen's; null where it is undefined.
    """

    question: Literal["refusal", "harmful", "incoherent"]
    first: str
    second: str
    both_yes: Count
    only_first: Count
    only_second: Count
    both_no: Count
    kappa: float | None


class Judges(Part, frozen=True):
    """How the rows were labelled: `decided` counts rows by the judge that decided, "" is none."""

    decided: dict[str, Count]
    records: list[JudgeRecord]
    agreement: list[Agreement]


class Selection(Part, frozen=True):
    """How layers and dose were chosen, on prompts that are not reported on.

    Attributes:
      sha256: of setup.json.
      dose_candidates, refusal_candidates: every candidate with its scores.
      refusal_near_miss: why the chosen refusal layer did not pass, if it did not.
    """

    sha256: Sha256
    dose_candidates: list[dict[str, Any]]
    refusal_candidates: list[dict[str, Any]]
    refusal_near_miss: list[str]


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
    rows: Rows
    files: dict[str, Sha256]
    environment: dict[str, str]
    samples: Samples | None


class Statement(Part, frozen=True):
    """An in-toto Statement v1 whose predicate is a refusal receipt."""

    type: Literal["https://in-toto.io/Statement/v1"] = msgspec.field(name="_type")
    subject: Annotated[list[Subject], Meta(min_length=1)]
    predicateType: Literal["urn:jaxsteer:refusal-receipt:v2"]
    predicate: Predicate


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
