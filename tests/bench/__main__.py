"""Run the benchmarks: python -m tests.bench [--only PART,...] [--full] [--rounds N] [--show].

Parts: `study`, the peers by name (hf-1, hf-8, hf-best, lens, nnsight), `small`, `long`,
`ceilings`, `compile`, `scaling`, all on this machine's CPU, and `accelerator`, on its GPU or TPU.
What is measured goes to results/bench/bench.json as it comes, and into a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from tests.bench import figures, table
from tests.bench.job import Job
from tests.bench.worker import cores

ROOT = Path(__file__).parent.parent.parent
CHECKPOINT = ROOT / "checkpoints/smollm2-135m"
PEERS_PYTHON = ROOT / ".venv-bench/bin/python"
SEED = 0
# (name, label, library, batch sizes to choose from, rows of a round, target)
PEERS: tuple[tuple[str, str, str, tuple[int, ...], int, float], ...] = (
    ("hf-1", "HF + hooks, one prompt at a time", "hf", (1,), 12, 20.0),
    ("hf-8", "HF + hooks, batch 8", "hf", (8,), 32, 5.0),
    ("hf-best", "HF + hooks, best batch", "hf", (16, 32, 64), 64, 3.0),
    ("lens", "TransformerLens, best batch", "lens", (8, 32, 64), 48, 6.0),
    ("nnsight", "nnsight, best batch", "nnsight", (8, 32, 64), 48, 6.0),
)
PARTS = (
    "study", *(peer[0] for peer in PEERS), "small", "long", "ceilings", "compile", "scaling",
    "accelerator",
)  # fmt: skip
# Rows of a small job, as in a notebook.
SMALL = (1, 12, 32, 96)
# Tokens of a long prompt, and of its reply.
LONG, LONG_REPLY = (700, 1400, 2845, 6000), 8
# Parts that a process of their own measures, by module.
ALONE = {
    "scaling": "cost against conditions, rows, layers and width",
    "accelerator": "a GPU or TPU",
}
# Libraries are compared on one device, which all of them can use.
ON_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
TUNING_TOKENS = 12
# Rows of HF's batches on a GPU: a batch holds one condition, and few conditions have more rows.
GPU_BATCH = 64


class Failed(Exception):
    """A library that does not load or run here, and why."""


class Worker:
    """A process that runs rows with one library; see `worker`."""

    def __init__(
        self,
        errors: IO[str],
        python: Path,
        name: str,
        *paths: Path,
        cache: Path | None = None,
        gpu: bool = False,
    ):
        environment = (
            os.environ
            | ({} if gpu else ON_CPU)
            | {
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": str(ROOT),
            }
        )
        if cache is not None:
            environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        self.errors = errors
        self.process = subprocess.Popen(
            [str(python), "-m", "tests.bench.worker", name, *map(str, paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )
        self.loaded = self._read()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """One request and its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"failed": self._last_words()}
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def _last_words(self) -> str:
        self.process.wait()
        self.errors.seek(0)
        return (self.errors.read().strip().splitlines() or ["it ended"])[-1]

    def close(self) -> None:
        """End the process by ending its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def worker(
    python: Path, name: str, *paths: Path, cache: Path | None = None, gpu: bool = False
) -> Iterator[Worker]:
    """A worker, ended at the end; it sees no GPU unless it is told to."""
    with tempfile.TemporaryFile("w+") as errors:
        started = Worker(errors, python, name, *paths, cache=cache, gpu=gpu)
        try:
            yield started
        finally:
            started.close()


class Bench:
    """One run of the benchmarks; `record` is what is written.

    Attributes:
      out: folder of the results.
      record: everything measured so far.
      rounds: turns of each pair.
      full: peers run every row of the study, once.
    """

    def __init__(self, out: Path, rounds: int, full: bool, console: Console):
        self.out, self.rounds, self.full, self.console = out, rounds, full, console
        self.record: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": machine(),
            "versions": {"python": platform.python_version(), "commit": commit()},
            "peers": [],
        }

    def save(self) -> None:
        """Write what there is."""
        path = self.out / "bench.json"
        path.with_suffix(".tmp").write_text(json.dumps(self.record, indent=1))
        path.with_suffix(".tmp").replace(path)

    def say(self, text: str) -> None:
        """A line about what goes on."""
        self.console.print(f"[dim]{datetime.datetime.now():%H:%M:%S}[/] {text}", highlight=False)

    def paths(self) -> tuple[Path, Path, Path]:
        """What a worker of jaxsteer is given: checkpoint, folder of the setup, our folder."""
        study = self.out / "study"
        study.mkdir(parents=True, exist_ok=True)
        # A demo that ran here has the setup; a copy, since another version may make it anew.
        for name in ("setup.json", "directions.safetensors"):
            made = ROOT / "results/smollm2-demo-smollm2-135m" / name
            if made.is_file() and not (study / name).is_file():
                shutil.copy(made, study / name)
        return CHECKPOINT, study, self.out

    def run(self, parts: set[str]) -> None:
        """Run parts in an order that leaves the machine to one library at a time."""
        if parts - set(ALONE):
            self._compared(parts)
        for part, words in ALONE.items():
            if part not in parts:
                continue
            self.say(words)
            checkpoint, study, _ = self.paths()
            done = subprocess.run(
                [sys.executable, "-m", f"tests.bench.{part}", str(checkpoint), str(study)],
                stdout=subprocess.PIPE,
                cwd=ROOT,
                check=True,
                env=os.environ | (ON_CPU if part == "scaling" else {}),
            )
            # Libraries may print before.
            self.record[part] = json.loads(done.stdout.splitlines()[-1])
            if self.record[part].get("platform") == "gpu":
                self.record[part]["hf"] = self._hf_on_gpu()
            self.save()

    def _hf_on_gpu(self) -> dict[str, Any]:
        """Every row of the study with HF and hooks on the GPU, in bfloat16; seconds, or why not."""
        self.say("HF + hooks on the GPU")
        rows = list(range(len(Job.load(self.out / "job").tokens)))
        try:
            with self._other("hf", gpu=True) as peer:
                peer.ask("run", rows=rows[:GPU_BATCH], batch=GPU_BATCH)
                done = peer.ask("run", rows=rows, batch=GPU_BATCH)
        except Failed as error:
            return {"skipped": str(error)}
        return {"batch": GPU_BATCH, "rows": len(rows), "seconds": done["seconds"]}

    def _other(self, library: str, gpu: bool = False) -> AbstractContextManager[Worker]:
        """A worker with another library.

        Raises:
          Failed: the environment of the other libraries was not made.
        """
        if not PEERS_PYTHON.is_file():
            raise Failed(f"no {PEERS_PYTHON.relative_to(ROOT)}; `make bench` makes it")
        return worker(PEERS_PYTHON, library, self.out / "job", self.out / "hf", gpu=gpu)

    def _compared(self, parts: set[str]) -> None:
        python = Path(sys.executable)
        with tempfile.TemporaryDirectory() as folder:
            cold = None
            if "compile" in parts:
                self.say("compiling, with an empty cache")
                with worker(python, "jaxsteer", *self.paths(), cache=Path(folder)) as first:
                    cold = self._twice(first)
            cache = Path(folder) if cold else None
            with worker(python, "jaxsteer", *self.paths(), cache=cache) as ours:
                self.record["versions"] |= ours.loaded["versions"]
                self.job = Job.load(self.out / "job")
                self.say("compiling, from the cache" if cold else "warming up")
                cached = self._twice(ours)
                if parts - {"small", "long"}:
                    self._study(ours, 3 if parts == {"study"} else 1)
                if cold:
                    self.record["compile"] = {
                        "programs": cold["programs"],
                        "cold_s": cold["first"] - cold["second"],
                        "cached_s": cached["first"] - cached["second"],
                        "later": self.study_programs - cached["programs"],
                    }
                for peer in PEERS:
                    if peer[0] in parts:
                        self._peer(ours, *peer)
                if self.record["peers"]:
                    self._study_again(ours)
                if "small" in parts:
                    self._small(ours)
                if "long" in parts:
                    self._long(ours)
                if "ceilings" in parts:
                    self._ceilings(ours)

    def _twice(self, ours: Worker) -> dict[str, Any]:
        """Seconds of the first and second run of rows that need every program of the study."""
        rows = covering(Job.load(self.out / "job"))
        first = ours.ask("run", rows=rows, batch=0)
        second = ours.ask("run", rows=rows, batch=0)
        return {
            "first": first["seconds"],
            "second": second["seconds"],
            "programs": first["programs"],
        }

    def _study(self, ours: Worker, times: int, before: Sequence[float] = ()) -> None:
        rows = list(range(len(self.job.tokens)))
        seconds = [*before]
        for number in range(times):
            self.say(f"the whole study, {len(rows)} rows ({number + 1} of {times})")
            done = ours.ask("run", rows=rows, batch=0)
            seconds.append(done["seconds"])
        self.tokens, self.study_programs = done["tokens"], done["programs"]
        self.record["study"] = {
            "rows": len(rows),
            "conditions": len(self.job.conditions),
            "slots": self.job.batch,
            "prompt_tokens": sum(map(len, self.job.tokens)),
            "new_tokens": sum(map(len, self.tokens)),
            "seconds": figures.median(seconds),
            "all_seconds": seconds,
            "peak_bytes": done["peak_bytes"],
        }
        self.save()

    def _study_again(self, ours: Worker) -> None:
        """Time the study after the peers, too, so that its median knows the machine as they did."""
        self._study(ours, 1, self.record["study"]["all_seconds"])
        for peer in self.record["peers"]:
            if "all_rounds" in peer:
                peer |= figures.compared(
                    self.record["study"], peer["all_rounds"], len(self.job.tokens)
                )
        self.save()

    def _peer(
        self,
        ours: Worker,
        name: str,
        label: str,
        library: str,
        sizes: tuple[int, ...],
        count: int,
        target: float,
    ) -> None:
        found: dict[str, Any] = {"name": name, "label": label, "target": target}
        try:
            self.say(f"{label}: loading")
            with self._other(library) as peer:
                self.record["versions"] |= peer.loaded["versions"]
                found |= self._turns(ours, peer, label, sizes, count)
        except Failed as error:
            found["skipped"] = str(error)
            self.say(f"{label}: skipped, {error}")
        self.record["peers"].append(found)
        self.save()

    def _turns(
        self, ours: Worker, peer: Worker, label: str, sizes: tuple[int, ...], count: int
    ) -> dict[str, Any]:
        batch, tried = self._tuned(peer, sizes)
        rows = figures.sample(self.job.condition, count, batch, SEED)
        if self.full:
            rows = list(range(len(self.job.tokens)))
        peer.ask("run", rows=rows[:1], batch=batch, new_tokens=2)
        rounds = []
        for number in range(1 if self.full else self.rounds):
            self.say(f"{label}: {len(rows)} rows, batch {batch} ({number + 1})")
            theirs = peer.ask("run", rows=rows, batch=batch)
            own = ours.ask("run", rows=rows, batch=0)
            rounds.append(
                {
                    "rows": len(rows),
                    "theirs_s": theirs["seconds"],
                    "ours_s": own["seconds"],
                }
            )
        same = [self.tokens[row] for row in rows]
        return {
            "batch": batch,
            "tried": tried,
            "all_rounds": rounds,
            "agreement": figures.agreement(same, theirs["tokens"]),
            "peak_bytes": theirs["peak_bytes"],
            **figures.compared(self.record["study"], rounds, len(self.job.tokens)),
        }

    def _tuned(self, peer: Worker, sizes: tuple[int, ...]) -> tuple[int, dict[str, float]]:
        """The batch size with most rows per second, on one batch of each with short replies."""
        if len(sizes) == 1:
            return sizes[0], {}
        tried: dict[str, float] = {}
        for size in sizes:
            rows = figures.sample(self.job.condition, 1, size, SEED)
            done = peer.ask("run", rows=rows, batch=size, new_tokens=TUNING_TOKENS)
            tried[str(size)] = len(rows) / done["seconds"]
        return int(max(tried, key=lambda size: tried[size])), tried

    def _small(self, ours: Worker) -> None:
        """Time few rows of one steered condition, warm, in turns with HF at its best batch."""
        steered = next(c for c, sites in enumerate(self.job.conditions) if sites)
        members = [row for row, c in enumerate(self.job.condition) if c == steered]
        found: list[dict[str, Any]] = []
        try:
            with self._other("hf") as peer:
                for count in SMALL:
                    rows = members[:count]
                    self.say(f"a small job of {count} rows")
                    sizes = sorted({min(count, size) for size in (12, 32, 96)})
                    tried = {s: peer.ask("run", rows=rows, batch=s)["seconds"] for s in sizes}
                    batch = min(tried, key=lambda size: tried[size])
                    ours.ask("small", rows=rows)
                    pairs = [
                        (
                            peer.ask("run", rows=rows, batch=batch)["seconds"],
                            ours.ask("small", rows=rows)["seconds"],
                        )
                        for _ in range(self.rounds)
                    ]
                    theirs, own = map(figures.median, zip(*pairs, strict=True))
                    found.append({"rows": count, "batch": batch, "theirs_s": theirs, "ours_s": own})
        except Failed as error:
            self.say(f"small jobs: skipped, {error}")
        self.record["small"] = found
        self.save()

    def _long(self, ours: Worker) -> None:
        """Time one long prompt, in turns with HF, whose attention is torch's own (sdpa)."""
        known = sorted({token for tokens in self.job.tokens for token in tokens})
        found: list[dict[str, Any]] = []
        try:
            with self._other("hf") as peer:
                for count in LONG:
                    self.say(f"a prompt of {count} tokens")
                    prompt = random.Random(SEED).choices(known, k=count)
                    turns = [
                        [side.ask("long", prompt=prompt, new_tokens=LONG_REPLY) for side in both]
                        for both in [(peer, ours)] * (1 + self.rounds)
                    ]
                    # Without the first turn, which compiles.
                    theirs, own = (
                        figures.median([each["seconds"] for each in side])
                        for side in zip(*turns[1:], strict=True)
                    )
                    found.append(
                        {
                            "tokens": count,
                            "theirs_s": theirs,
                            "ours_s": own,
                            "first_s": turns[0][1]["seconds"],
                            "same": turns[0][0]["tokens"] == turns[0][1]["tokens"],
                        }
                    )
        except Failed as error:
            self.say(f"long prompts: skipped, {error}")
        self.record["long"] = found
        self.save()

    def _ceilings(self, ours: Worker) -> None:
        self.say("ceilings of the machine")
        rows = sorted({1, 8, 32, 64, 128, self.job.batch})
        self.record["ceilings"] = {"JAX": ours.ask("ceilings", library="jax", rows=rows)}
        try:
            with self._other("hf") as peer:
                found = peer.ask("ceilings", library="torch", rows=rows)
                self.record["ceilings"]["torch"] = found
        except Failed:
            self.say("no torch to measure with")
        self.say("prefill and decode alone")
        self.record["phases"] = figures.shares(
            ours.ask("phases", batch=0), list(self.record["ceilings"].values())
        )
        self.save()


def covering(job: Job) -> list[int]:
    """Rows that together need every program: of each prompt length one, conditions in turn."""
    chosen: dict[int, int] = {}
    for row, tokens in enumerate(job.tokens):
        chosen.setdefault(len(tokens), row)
    conditions = {job.condition[row]: row for row in range(len(job.tokens))}
    return sorted({*chosen.values(), *conditions.values()})


def commit() -> str:
    """The code that runs; `-dirty` where it is not what was committed."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """The hardware and how busy it was."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.is_file() else [])
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "platform": f"{platform.system()} {platform.machine()}",
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--full", action="store_true", help="peers run every row of the study")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each pair")
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench")
    parser.add_argument("--show", action="store_true", help="print the last table again")
    options = parser.parse_args()
    # A log file has no width of its own, and 80 columns would break every cell.
    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.show:
        table.show(json.loads((options.out / "bench.json").read_text()), console)
        return
    parts = set(options.only.split(","))
    if parts - set(PARTS):
        parser.error(f"no part {sorted(parts - set(PARTS))[0]!r}; they are {', '.join(PARTS)}")
    bench = Bench(options.out, options.rounds, options.full, console)
    bench.run(parts)
    table.show(bench.record, console)


if __name__ == "__main__":
    main()
