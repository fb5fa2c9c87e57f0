"""Stop signals at random moments of real commands, from their start to their end.

`python -m tests.cli.signals 40 0 extract sweep` sends 40 of each kind to each of these commands, at
moments drawn with seed 0, and prints how they ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from jaxsteer.data.wheels import cache_dir
from jaxsteer.directions import direction
from jaxsteer.files import sha256_file
from jaxsteer.judges import verdicts
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from tests import tiny
from tests.judges.scripted import says, serve
from tests.receipt import made

KINDS = (signal.SIGINT, signal.SIGTERM)
FOREVER = 600
# Where a stop was taken for something else.
FALSE = ("Traceback", "damaged", "cannot", "convert the model again", "fault", "ignored", "Error")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command with the files it leaves.

    Attributes:
      arguments: its command line.
      out: the file or folder that it writes.
      outcome: what `out` holds, read by the package: it raises if a file is not whole.
      begin: makes what must be there before it.
    """

    arguments: list[str]
    out: Path
    outcome: Callable[[Path], Any]
    begin: Callable[[Path], object] = lambda out: None


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended: after a signal, or by itself before one was sent.

    Attributes:
      heard: whether the command's own handler was there when the signal came. In the first
        moments Python itself ends the process, and nothing has been written.
      seconds: from the signal, or from the start, to the end.
    """

    name: str
    kind: signal.Signals
    moment: float
    sent: bool
    heard: bool
    code: int
    seconds: float
    said: str

    def faults(self) -> list[str]:
        """What is wrong with this end, the time that it took apart."""
        if not self.sent:
            return [] if self.code == 0 else [self.said]
        if not self.heard:
            return []
        stops = [line for line in self.said.splitlines() if line.startswith("jaxsteer: ")]
        found = [word for word in FALSE if word in self.said]
        if self.code != 128 + self.kind:
            found.append(f"exit code {self.code}")
        if not (len(stops) == 1 and stops[0].startswith("jaxsteer: stopped")):
            found.append(f"says {self.said!r}")
        return found


def directions(path: Path) -> dict[str, str]:
    return {name: found.sha256 for name, found in direction.load(path).items()}


def checkpoint(path: Path) -> dict[str, str]:
    ChatModel.load(path)
    return {str(p.relative_to(path)): sha256_file(p) for p in path.rglob("*.json")}


def swept(path: Path) -> tuple[list[Any], str]:
    for shard in path.glob("shards/*.parquet"):
        pl.read_parquet(shard)
    return pl.read_parquet(path / "responses.parquet").rows(), (path / "summary.json").read_text()


def judged(path: Path) -> dict[str, list[Any]]:
    return {name: sorted(table.rows()) for name, table in verdicts.read_all(path).items()}


@contextlib.contextmanager
def commands(folder: Path) -> Iterator[dict[str, Command]]:
    """The commands on a tiny model; their scripted judge lives as long as the context."""
    hf = tiny.save(tiny.llama(), folder / "hf")
    model = str(convert(hf, folder / "model", "float32"))
    study = tiny.study_file(folder, ("n = 6", "n = 24"), ("batch = 4", "batch = 2"))
    file, out = folder / "d.safetensors", folder / "out"
    asked = ["--steer", "compliant@1x4", "--project", "compliant@2", "--directions", str(file)]
    with serve(says('{"coherence": 90}')) as server:
        judges = [a for name in ("keyword", "degenerate", "coherence") for a in ("--judge", name)]
        endpoint = ["--base-url", server.base_url, "--judge-model", "m", "--concurrency", "2"]
        yield {
            "generate": Command(
                ["generate", "w1 w2", "--model", model, *asked, "--max-new-tokens", "64"],
                file,
                directions,
            ),
            "extract": Command(
                ["extract", "compliant", "random-1", "--model", model, "--out", str(file)],
                file,
                directions,
            ),
            "convert": Command(["convert", str(hf), "--out", str(out)], out, checkpoint),
            "sweep": Command(
                ["sweep", str(study), "--model", model, "--out", str(out)], out, swept
            ),
            "judge": Command(["judge", str(out), *judges, *endpoint], out, judged, made.folder),
        }


def hears(pid: int) -> bool:
    """Whether a process has a handler of its own for SIGTERM, for which Python has none."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def run(name: str, command: Command, kind: signal.Signals, moment: float, compiled: bool) -> Ended:
    """Run a command and send it a signal after `moment` seconds, if it has not ended by then."""
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache_dir() / "xla-tests")}
    env |= {"JAX_ENABLE_COMPILATION_CACHE": str(compiled).lower()}
    env |= {"JAXSTEER_CACHE": str(command.out.parent / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxsteer.cli", *command.arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    began, sent, heard = time.monotonic(), False, False
    try:
        said = process.communicate(timeout=moment)[1]
    except subprocess.TimeoutExpired:
        began, sent, heard = time.monotonic(), True, hears(process.pid)
        process.send_signal(kind)
        said = process.communicate()[1]
    seconds = time.monotonic() - began
    return Ended(name, kind, moment, sent, heard, process.returncode, seconds, said)


def clear(command: Command) -> None:
    shutil.rmtree(command.out, ignore_errors=True)
    if command.out.is_file():
        command.out.unlink()
    command.begin(command.out)


def left(command: Command) -> Any:
    """What a command left at its end, of which nothing is half-written."""
    hidden = [p for p in command.out.parent.rglob(".*") if not p.name.endswith(".lock")]
    assert not hidden, hidden
    return command.outcome(command.out)


def measure(name: str, command: Command, count: int, seed: int = 0) -> list[Ended]:
    """Send `count` signals of each kind to a command, at moments spread from its start to its end.

    Every few stops it goes on to its end, and what it leaves must be what it leaves undisturbed.
    A third of the runs compile their programs.

    Raises:
      AssertionError: what it left is not that.
    """
    draw, found = random.Random(f"{seed} {name}"), list[Ended]()
    lasts: dict[bool, float] = {}
    # The first run reads the imports from a cold disk.
    for compiled in (False, True):
        clear(command)
        lasts[compiled] = run(name, command, KINDS[0], FOREVER, compiled).seconds
        expected = left(command)
    for kind in KINDS:
        clear(command)
        stops = in_a_row = 0
        while stops < count or in_a_row:
            compiled = draw.random() > 1 / 3
            moment = draw.uniform(0, lasts[compiled])
            if stops == count or in_a_row == 8:
                moment = FOREVER
            ended = run(name, command, kind, moment, compiled)
            found.append(ended)
            stops, in_a_row = stops + ended.sent, in_a_row + 1 if ended.sent else 0
            if not ended.sent:
                assert ended.code == 0, ended
                assert left(command) == expected, ended
                clear(command)
    return found


def main(count: int, seed: int, names: list[str]) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder, commands(Path(folder)) as known:
        for name in names or known:
            found = measure(name, known[name], count, seed)
            for kind in KINDS:
                sent = [ended for ended in found if ended.kind == kind and ended.sent]
                times = sorted(ended.seconds for ended in sent if ended.heard)
                print(
                    f"{name} {kind.name}: {len(times)} heard, {len(sent) - len(times)} too early; "
                    f"to the end: median {times[len(times) // 2]:.2f} s, longest {times[-1]:.2f} s",
                    flush=True,
                )
            for ended in found:
                if ended.faults() or (ended.sent and ended.seconds > 2):
                    print(f"  {ended}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
