"""A process with one library loaded: reads one JSON request a line, answers in one line.

    python -m tests.bench.worker NAME FOLDER ...

{"do": "run", "rows": [0, 5], "batch": 8} answers {"seconds": ..., "tokens": [[...], [...]]}. It
waits without using a core between requests, so that processes can take turns: A B A B.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def peak_memory() -> int:
    """The most memory this process has held, in bytes."""
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def load(name: str, paths: list[Path]) -> tuple[Any, dict[str, str]]:
    """The library behind a name, and its versions."""
    if name == "jaxsteer":
        from jaxsteer.data.wheels import use_compile_cache
        from tests.bench import ours

        use_compile_cache()
        return ours.Ours(*paths), ours.versions()
    import torch

    from tests.bench import peers
    from tests.bench.job import Job

    torch.set_grad_enabled(False)
    torch.set_num_threads(cores())
    job, hf = paths
    return peers.PEERS[name](Job.load(job), hf), peers.versions(name)


def answer(library: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Do what a request asks."""
    start = time.perf_counter()
    if request["do"] == "small":
        tokens = library.small(request["rows"])
        found: dict[str, Any] = {"seconds": time.perf_counter() - start, "tokens": tokens}
    elif request["do"] == "long":
        tokens = library.long(request["prompt"], request["new_tokens"])
        found = {"seconds": time.perf_counter() - start, "tokens": tokens}
    elif request["do"] == "run":
        tokens = library.run(request["rows"], request["batch"], request.get("new_tokens"))
        found = {"seconds": time.perf_counter() - start, "tokens": tokens}
    elif request["do"] == "phases":
        from tests.bench import ours

        found = dict(ours.phases(library, request["batch"]))
    else:
        from tests.bench import ceilings

        found = ceilings.measure(request["library"], request["rows"])
    if hasattr(library, "programs"):
        found["programs"] = library.programs
    return found | {"peak_bytes": peak_memory()}


def main(name: str, *paths: str) -> None:
    """Load, say so, and answer until the input ends."""
    # What libraries print must not get between the lines of the protocol.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    start = time.perf_counter()
    try:
        library, versions = load(name, [Path(path) for path in paths])
    except Exception as error:
        print(json.dumps({"failed": f"{type(error).__name__}: {error}"}), file=out)
        raise
    print(json.dumps({"load_s": time.perf_counter() - start, "versions": versions}), file=out)
    for line in sys.stdin:
        try:
            print(json.dumps(answer(library, json.loads(line))), file=out)
        except Exception as error:
            print(json.dumps({"failed": f"{type(error).__name__}: {error}"}), file=out)
            raise


if __name__ == "__main__":
    main(*sys.argv[1:])
