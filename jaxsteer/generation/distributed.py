"""Several processes share one study: the same command on every host, one results folder.

`jax.distributed` connects the processes, holds their barriers and ends them all when one is lost.
Each process has its own copy of the model on its own devices; the list of rows is what they share:

    process 0            makes directions and selection, locks the folder, writes the table
    every process        reads the setup, runs its share of the rows, writes their shards

When a process ends early, JAX ends the others within `HEARTBEAT` seconds with a non-zero exit code
and its own message. The same command, with any number of processes, continues from the shards.

The folder must be mounted on all hosts. It needs no lock between hosts and no order between files:
a whole file that appears under its final name is enough, even if it appears late. NFS and a mounted
bucket both guarantee that.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from jaxsteer.errors import UserError, heed_stop
from jaxsteer.files import stable_id

# Seconds without a heartbeat after which a process counts as lost. JAX's own 100 would leave a
# slice idle for that long; a thread of its own sends heartbeats, so a busy process sends them too.
HEARTBEAT = 20
# Seconds until a file that one host wrote is visible on another: NFS and mounted buckets both look
# again after 60.
VISIBLE = 120
# Seconds after which a waiting main thread looks again whether the wait is over.
EVERY = 5
# A barrier has to have a time limit. JAX notices lost processes, so a slow one may take a month.
_MONTH = 30 * 24 * 3600 * 1000

_barriers = itertools.count()
_joined = threading.Event()

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """This process among those that share a study.

    Attributes:
      process: its number, from 0.
      count: number of processes.
    """

    process: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process prepares the study and writes its results."""
        return self.process == 0

    def share(self, sequences: Sequence[str]) -> set[int]:
        """Which rows this process runs; shares differ by one row at most.

        The rows of one packed sequence stay together where that is possible, since they share its
        prefill. The shares depend only on the list of rows and the number of processes.

        Args:
          sequences: the name of every row's packed sequence.

        >>> [Hosts(process=p, count=2).share(["a", "b", "a", "b"]) for p in range(2)]
        [{1, 3}, {0, 2}]
        """
        # By hash, so that every share has a part of every family: some have long replies.
        order = sorted(range(len(sequences)), key=lambda i: (stable_id(sequences[i]), sequences[i]))
        size = len(order)
        return set(
            order[size * self.process // self.count : size * (self.process + 1) // self.count]
        )

    def meet(self, place: str) -> None:
        """Wait until every process has called this.

        Args:
          place: a name for the barrier, the same in every process.
        """
        if self.count == 1:
            return
        import orbax.checkpoint

        # All processes reach the same barriers in the same order, and each needs a name of its own.
        key = f"jaxsteer-{next(_barriers)}-{place}"
        barrier = orbax.checkpoint.multihost.get_barrier_sync_fn()
        _interruptibly(lambda: barrier(key=key, timeout_ms=_MONTH))

    def seen(self, find: Callable[[], Found | None]) -> Found | None:
        """What `find` returns; with several hosts, retried until their files must be visible."""
        limit = time.monotonic() + (VISIBLE if self.count > 1 else 0)
        while (found := find()) is None and time.monotonic() < limit:
            heed_stop()
            time.sleep(1)
        return found


ALONE = Hosts()


def join(address: str, processes: int | None = None, process: int | None = None) -> Hosts:
    """Join the other processes of this run; call it before anything else of JAX.

    Args:
      address: HOST:PORT of process 0, with a free port; `auto` for a TPU pod, Slurm or Open MPI.
      processes: number of processes; None for what the cluster says.
      process: number of this one, from 0; None for what the cluster says.

    Raises:
      UserError: an address of another form, or numbers or a port that JAX refuses.
    """
    if address != "auto" and not re.fullmatch(r"\S+:\d+", address):
        raise UserError(f"--hosts {address!r} is neither auto nor HOST:PORT of process 0")
    import jax

    _joined.set()
    # JAX would handle SIGTERM itself, and its CPU collectives, which nothing here uses, would print
    # to stdout.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", None)
    try:
        _interruptibly(
            lambda: jax.distributed.initialize(
                None if address == "auto" else address,
                processes,
                process,
                heartbeat_timeout_seconds=HEARTBEAT,
            )
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"JAX cannot connect the processes ({error}); give "
            "--hosts HOST:PORT --processes N --process I, or --hosts auto in a cluster"
        ) from None
    return Hosts(process=jax.process_index(), count=jax.process_count())


def _interruptibly(wait: Callable[[], None]) -> None:
    """Wait in a thread: Python runs signal handlers only while its main thread is in Python."""
    failed: list[Exception] = []

    def waiting() -> None:
        try:
            wait()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=waiting, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(EVERY)
        heed_stop()
    if failed:
        raise failed[0]


def sharing() -> bool:
    """Whether this process has joined others that share a run."""
    return _joined.is_set()


def leave(code: int) -> NoReturn:
    """End this process; when it shares a run, at once, so that JAX ends the others too."""
    if sharing():
        # An orderly exit would first wait for the other processes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
