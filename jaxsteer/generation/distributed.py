"""Several processes share one study: the same command on every host, one results folder.

JAX's own engine (`jax.distributed`) joins them, lets them wait for each other and notices when one
is gone. Each has its own model and devices; what they share is the list of rows:

    process 0            makes directions and selection, holds the folder's lock, writes the table
    every process        reads the setup, runs its share of the rows, writes their shards

A process that ends, in whatever way, ends the others within HEARTBEAT seconds, and the same
command goes on from the shards, with as many processes as one likes.

The folder must be one that all hosts mount. It needs no lock between hosts and no order between
files: whole files that appear under their final name are enough, be it late. An NFS mount and a
mounted bucket both do that.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn, TypeVar

from jaxsteer.errors import UserError
from jaxsteer.files import stable_id

# Seconds without a sign of life after which a process counts as gone, and to wait for all of them
# at the start. JAX's own 100 would leave a slice that is paid for idle; the sign is given by a
# thread of its own, however busy the process is.
HEARTBEAT = 20
ARRIVAL = 300
# Seconds until a file written on one host shows on another: NFS looks again after 60, as does a
# mounted bucket.
VISIBLE = 120
# Seconds between two looks at how far the others are.
EVERY = 5
# A slow process is not a gone one: as long as there are signs of life, wait.
_MONTH = 30 * 24 * 3600 * 1000
GO_ON = (
    "what is finished is kept, run the same command again on every host (without --fresh) to go on"
)

_meetings = itertools.count()
_joined = threading.Event()

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """This process among those that share a study.

    Attributes:
      process: its number, from 0.
      count: how many there are.
    """

    process: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that prepares the study and writes its results."""
        return self.process == 0

    def share(self, lanes: Sequence[str]) -> set[int]:
        """Which rows are this process's; shares differ by one row at most.

        The rows of one lane stay together where they can, since they share work. Whose a row is
        depends on the list of rows and the number of processes alone.

        Args:
          lanes: the name of the lane of every row of the study.

        >>> [Hosts(process=p, count=2).share(["a", "b", "a", "b"]) for p in range(2)]
        [{1, 3}, {0, 2}]
        """
        # By hash, so that each share has its part of every family: some have long replies.
        order = sorted(range(len(lanes)), key=lambda i: (stable_id(lanes[i]), lanes[i]))
        size = len(order)
        return set(
            order[size * self.process // self.count : size * (self.process + 1) // self.count]
        )

    def meet(self, place: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until every process is here.

        Args:
          place: the same everywhere, for whoever reads a trace.
          meanwhile: called every few seconds of the wait, to say how far the others are.

        Raises:
          UserError: a process is gone; most often JAX ends this one before that is said.
        """
        if self.count == 1:
            return
        import orbax.checkpoint

        # Every process comes to the same meetings in the same order, and none is held twice.
        meeting = f"jaxsteer-{next(_meetings)}-{place}"
        wait = orbax.checkpoint.multihost.get_barrier_sync_fn()
        try:
            _interruptibly(lambda: wait(key=meeting, timeout_ms=_MONTH), meanwhile)
        except Exception as error:
            # JAX is ending this process as well, and `words` says why better than we could.
            threading.Event().wait(HEARTBEAT)
            raise UserError(f"lost another process; {GO_ON}") from error

    def seen(self, find: Callable[[], Found | None]) -> Found | None:
        """What `find` finds in the shared folder, tried until what others wrote must be visible."""
        limit = time.monotonic() + (VISIBLE if self.count > 1 else 0)
        while (found := find()) is None and time.monotonic() < limit:
            time.sleep(1)
        return found


ALONE = Hosts()


def join(
    address: str,
    processes: int | None = None,
    process: int | None = None,
    *,
    arrival: int = ARRIVAL,
) -> Hosts:
    """Join the other processes of this run; call it before anything else of JAX.

    Args:
      address: HOST:PORT of process 0, a free port there; `auto` asks the cluster (TPU pods, Slurm,
        Open MPI), and takes what is given in $JAX_COORDINATOR_ADDRESS.
      processes: how many processes there are; None asks the cluster.
      process: this one's number, from 0; None asks the cluster.
      arrival: seconds to wait for the others.

    Raises:
      UserError: no cluster is found, numbers that do not fit, or the port is taken. When others do
        not come, JAX ends the process and one line says so.
    """
    # An address of IPv6 has colons of its own, and stands in brackets.
    named = re.fullmatch(r"(?:[^:\s\[\]]+|\[[^\s\[\]]+\]):([0-9]{1,5})", address)
    port = int(named[1]) if named else 0
    if address != "auto" and not 0 < port < 2**16:
        raise UserError(f"--hosts {address!r} is neither auto nor HOST:PORT of process 0")
    if (processes is None) != (process is None) or (address != "auto" and process is None):
        raise UserError("--hosts HOST:PORT, --processes and --process go together; give all three")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(f"--process {process} is none of 0 to {processes - 1}")
    if process == 0 and address != "auto":
        _check_free(port)
    import jax

    _joined.set()
    _word_native_messages()
    # It would take SIGTERM for itself, with which a stop is asked for.
    jax.config.update("jax_enable_preemption_service", False)
    # No arrays go between processes; and its library greets the world on stdout.
    jax.config.update("jax_cpu_collectives_implementation", None)
    try:
        _interruptibly(
            lambda: jax.distributed.initialize(
                None if address == "auto" else address,
                processes,
                process,
                local_device_ids=_devices(),
                initialization_timeout=arrival,
                heartbeat_timeout_seconds=HEARTBEAT,
            )
        )
    except ValueError:
        raise UserError(
            "--hosts auto finds no TPU pod, Slurm or Open MPI job here; give "
            "--hosts HOST:PORT --processes N --process I"
        ) from None
    return Hosts(process=jax.process_index(), count=jax.process_count())


def _devices() -> list[int] | None:
    """Which GPUs JAX shows this process: an empty list for all, None for what JAX does by itself.

    In a Slurm or Open MPI job JAX gives each process the one GPU of its number on the node. That is
    right for a process per GPU; one that has the node to itself has all of them.
    """
    if os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    # mpirun starts its own processes in a Slurm step of one task a node, so it is asked first.
    # Slurm says 1(x2) of a step of one task on each of 2 nodes, and 3,1 where the numbers differ.
    tasks = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or os.environ.get(
        "SLURM_STEP_TASKS_PER_NODE", ""
    )
    return [] if re.fullmatch(r"1(\(x\d+\))?", tasks) else None


def _check_free(port: int) -> None:
    # JAX would say it, or crash (jaxlib 0.10).
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            raise UserError(
                f"process 0 cannot have port {port} ({error.strerror}); choose another in --hosts"
            ) from None


def _interruptibly(wait: Callable[[], None], meanwhile: Callable[[], None] = lambda: None) -> None:
    """Wait in a thread: a signal cannot interrupt the main one while it is in foreign code."""
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
        meanwhile()
    if failed:
        raise failed[0]


def leave(code: int) -> NoReturn:
    """End this process; when it shares a run, without waiting for the others, who then end too."""
    if _joined.is_set():
        # An orderly end of JAX waits for the others, or crashes when it never began.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# -- What JAX says when a process is gone ----------------------------------------------------------
#
# Its client then prints a native stack and aborts, and Python is not asked. So what native code
# prints goes through a second process, which says the same in one line.

_FATAL = "JAX distributed service detected fatal errors"
_ABOUT = ("coordination_service", _FATAL)


def _word_native_messages() -> None:
    import resource

    # An abort would otherwise write the whole model to a core file first.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    # A session of its own: a Ctrl-C in the terminal is not for it.
    wording = subprocess.Popen(
        [sys.executable, "-m", "jaxsteer.generation.distributed"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert wording.stdin is not None
    sys.stderr.flush()
    # Python's own messages go where they went.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(wording.stdin.fileno(), 2)
    wording.stdin.close()


def words(lines: Iterable[str]) -> Iterator[str]:
    """What to print of a process's native messages: all, but one line when others are gone."""
    held: list[str] = []
    for line in lines:
        if held or any(mark in line for mark in _ABOUT):
            held.append(line)
        else:
            yield line
    text = "".join(held)
    yield f"jaxsteer: {_lost(text)}; {GO_ON}\n" if _FATAL in text else text


def _lost(text: str) -> str:
    status = text.rpartition("absl::Status: ")[2].partition("\n")[0]
    if silent := re.search(r"stopped sending heartbeats\):\s*([\d\s,]*\d)", text):
        numbers = re.findall(r"\d+", silent[1])
        return f"lost process{'es' if len(numbers) > 1 else ''} {', '.join(numbers)}"
    if "RegisterTask" in text:
        return "not all processes of this run came in time"
    if status.startswith("UNAVAILABLE"):
        return "lost process 0"
    return f"lost another process ({status})"


if __name__ == "__main__":
    for said in words(line.decode(errors="replace") for line in sys.stdin.buffer):
        sys.stderr.write(said)
        sys.stderr.flush()
