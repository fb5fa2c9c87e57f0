"""The record of a benchmark as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.bench.figures import verdict

TARGETS = {"decode": 0.5, "prefill": 0.8, "cold_s": 15.0}


def show(record: Mapping[str, Any], console: Console) -> None:
    """Print what a record holds; parts that were not run are left out."""
    machine = record["machine"]
    console.print(
        f"[bold]jaxsteer bench[/]  {escape(machine['cpu'])}, {machine['cores']} cores, "
        f"{machine['memory_gb']:.0f} GB, load {machine['load']:.1f} before; {record['date']}"
    )
    console.print(
        "  ".join(f"{name} {version}" for name, version in record["versions"].items()),
        style="dim",
        highlight=False,
    )
    for part in (_study, _peers, _small, _long, _hardware, _compiling, _scaling, _accelerator):
        part(record, console)


def _study(record: Mapping[str, Any], console: Console) -> None:
    if "study" not in record:
        return
    study = record["study"]
    console.print(
        f"\nThe demo study, whole: {study['rows']} rows ({study['conditions']} conditions), "
        f"{study['prompt_tokens']} prompt and {study['new_tokens']} new tokens, "
        f"{study['slots']} slots: [bold]{study['seconds']:.1f} s[/], "
        f"{study['new_tokens'] / study['seconds']:.0f} new tokens/s end to end "
        f"(median of {len(study['all_seconds'])}, compile excluded), "
        f"peak memory {study['peak_bytes'] / 1e9:.1f} GB"
    )


def peer_cells(peer: Mapping[str, Any]) -> list[str]:
    """One line of the comparison."""
    study = f"{peer['study_s']:.0f} s" + (" *" if peer["extrapolated"] else "")
    return [
        peer["label"],
        str(peer["batch"]),
        f"{peer['rows']} x {peer['rounds']}",
        f"{peer['theirs_s']:.1f} / {peer['ours_s']:.1f}",
        f"{peer['same_rows']:.1f}x",
        study,
        f"{peer['study']:.1f}x",
        f"{peer['target']:g}x {verdict(peer['study'], peer['target'])}",
        f"{100 * peer['agreement']:.0f} %",
        f"{peer['peak_bytes'] / 1e9:.1f} GB",
    ]


def _peers(record: Mapping[str, Any], console: Console) -> None:
    if not record.get("peers"):
        return
    table = Table(title="\nBeside jaxsteer, in turns A B A B, medians", title_justify="left")
    for name in (
        "peer",
        "batch",
        "rows x n",
        "s, theirs / ours",
        "same rows",
        "whole study",
        "over ours",
        "target",
        "same tokens",
        "memory",
    ):
        table.add_column(name, justify="left" if name == "peer" else "right")
    for peer in record["peers"]:
        if "skipped" not in peer:
            table.add_row(*map(escape, peer_cells(peer)))
    console.print(table)
    for peer in record["peers"]:
        if "skipped" in peer:
            console.print(escape(f"{peer['label']}: skipped, {peer['skipped']}"))
    console.print(
        "* extrapolated from its rows to the whole study (each batch of one condition costs what "
        "it costs). On few rows jaxsteer's slots stand empty: 'same rows' is its worst case.",
        style="dim",
    )


def _small(record: Mapping[str, Any], console: Console) -> None:
    if not record.get("small"):
        return
    table = Table(title="\nSmall jobs of one condition, warm, beside HF", title_justify="left")
    for name in ("rows", "batch of HF", "s, theirs / ours", "over ours", "target"):
        table.add_column(name, justify="right")
    for job in record["small"]:
        times = job["theirs_s"] / job["ours_s"]
        table.add_row(
            str(job["rows"]),
            str(job["batch"]),
            f"{job['theirs_s']:.2f} / {job['ours_s']:.2f}",
            f"{times:.1f}x",
            f"1x {verdict(times, 1)}",
        )
    console.print(table)


def _long(record: Mapping[str, Any], console: Console) -> None:
    if not record.get("long"):
        return
    table = Table(title="\nOne long prompt, warm, beside HF (sdpa)", title_justify="left")
    for name in ("tokens", "s, theirs / ours", "over ours", "target", "ours, first", "same reply"):
        table.add_column(name, justify="right")
    for prompt in record["long"]:
        times = prompt["theirs_s"] / prompt["ours_s"]
        table.add_row(
            str(prompt["tokens"]),
            f"{prompt['theirs_s']:.2f} / {prompt['ours_s']:.2f}",
            f"{times:.2f}x",
            f"1x {verdict(times, 1)}",
            f"{prompt['first_s']:.1f}",
            "yes" if prompt["same"] else "no",
        )
    console.print(table)


def _hardware(record: Mapping[str, Any], console: Console) -> None:
    if "ceilings" in record:
        table = Table(title="\nCeilings of this machine, float32", title_justify="left")
        for name in ("library", "matmul 2048", "by rows x 576 x 1536", "read", "copy (both ways)"):
            table.add_column(name, justify="left" if name == "library" else "right")
        for library, found in record["ceilings"].items():
            rows = "  ".join(f"{n}: {v / 1e9:.0f}" for n, v in found["matmul_rows"].items())
            table.add_row(
                library,
                f"{found['matmul'] / 1e9:.0f} GFLOP/s",
                rows,
                f"{found['read'] / 1e9:.1f} GB/s",
                f"{found['copy'] / 1e9:.1f} GB/s",
            )
        console.print(table)
    if "phases" not in record:
        return
    table = Table(title="\nShare of the ceiling, nothing shared, slots full", title_justify="left")
    for name in ("phase", "tokens/s", "ceiling", "bound by", "share", "target", "at its rows"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for name in ("prefill", "decode"):
        found = record["phases"][name]
        table.add_row(
            name,
            f"{found['rate']:.0f}",
            f"{found['ceiling']:.0f}",
            found["bound"],
            f"{100 * found['share']:.0f} %",
            f"{100 * TARGETS[name]:.0f} % {verdict(found['share'], TARGETS[name])}",
            f"{100 * found['share_at_rows']:.0f} %" if "share_at_rows" in found else "",
        )
    console.print(table)
    console.print(
        "The ceiling is the large product or the memory, whichever is slower; 'at its rows' takes "
        "the product of as many rows as decode together instead.",
        style="dim",
    )


def _compiling(record: Mapping[str, Any], console: Console) -> None:
    if "compile" not in record:
        return
    found = record["compile"]
    met = "met" if found["cold_s"] <= TARGETS["cold_s"] else "not met"
    console.print(
        f"\nCompiling the study: {found['programs']} programs, cold {found['cold_s']:.1f} s "
        f"(target <= {TARGETS['cold_s']:g} s, {met}), from the cache {found['cached_s']:.1f} s; "
        f"{found['later']} more while the whole study ran"
    )


def _scaling(record: Mapping[str, Any], console: Console) -> None:
    if "scaling" not in record:
        return
    table = Table(title="\nCost ~ size ^ exponent (small random models)", title_justify="left")
    for name in ("against", "exponent", "points: size, seconds"):
        table.add_column(name, justify="right" if name == "exponent" else "left")
    for axis, found in record["scaling"].items():
        points = "  ".join(f"{size}: {seconds:.2f}" for size, seconds in found["points"])
        table.add_row(axis, f"{found['exponent']:.2f}", points)
    console.print(table)


def _accelerator(record: Mapping[str, Any], console: Console) -> None:
    if "accelerator" not in record:
        return
    found = record["accelerator"]
    if "skipped" in found:
        console.print(escape(f"\nGPU or TPU: skipped, {found['skipped']}"))
        return
    title = f"\nThe demo study on {escape(found['device'])}, bfloat16, compile excluded"
    table = Table(title=title, title_justify="left")
    for name in (
        "slots",
        "seconds",
        "new tokens/s",
        "prefill of its ceiling",
        "decode",
        "bound by",
    ):
        table.add_column(name, justify="right")
    for study, phases in zip(found["study"], found["phases"], strict=True):
        table.add_row(
            str(study["slots"]),
            f"{study['seconds']:.1f}",
            f"{study['rate']:.0f}",
            f"{100 * phases['prefill']['share']:.0f} %",
            f"{100 * phases['decode']['share']:.0f} %",
            phases["decode"]["bound"],
        )
    console.print(table)
    large = found["table"]
    console.print(
        f"The paper's table on random weights of its size: {large['rows']} rows of "
        f"{large['new_tokens']} new tokens, {large['slots']} slots: "
        f"[bold]{large['seconds']:.1f} s[/]"
    )
    hf = found.get("hf", {"skipped": "only on a GPU"})
    if "skipped" in hf:
        console.print(escape(f"HF + hooks on this device: skipped, {hf['skipped']}"))
        return
    ours = min(study["seconds"] for study in found["study"])
    console.print(
        f"HF + hooks on this device, all {hf['rows']} rows, batch {hf['batch']}: "
        f"{hf['seconds']:.1f} s; jaxsteer is [bold]{hf['seconds'] / ours:.1f}x[/]"
    )
