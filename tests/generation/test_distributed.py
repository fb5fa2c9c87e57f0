"""Shares of rows and barriers, and real processes that wait for each other."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsteer.errors import UserError
from jaxsteer.generation import distributed
from jaxsteer.generation.distributed import Hosts

SEQUENCES = st.lists(st.sampled_from([f"p{i}" for i in range(9)]), max_size=60)


@given(SEQUENCES, st.integers(1, 8))
def test_every_row_is_in_one_share_and_shares_are_even(sequences, count):
    shares = [Hosts(process=p, count=count).share(sequences) for p in range(count)]
    assert Counter(row for share in shares for row in share) == Counter(range(len(sequences)))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@given(SEQUENCES, st.integers(1, 8))
def test_the_rows_of_few_sequences_are_split(sequences, count):
    processes: dict[str, set[int]] = {}
    for p in range(count):
        for row in Hosts(process=p, count=count).share(sequences):
            processes.setdefault(sequences[row], set()).add(p)
    # A cut between two shares splits at most one sequence.
    assert sum(len(of) - 1 for of in processes.values()) <= count - 1


def test_one_process_has_all_rows_and_does_not_wait():
    assert distributed.ALONE.share(["a", "b", "a"]) == {0, 1, 2}
    distributed.ALONE.meet("anywhere")
    assert distributed.ALONE.seen(lambda: None) is None


def test_what_another_host_wrote_is_looked_for_until_it_is_visible():
    answers = iter([None, "there"])
    assert Hosts(process=1, count=2).seen(lambda: next(answers)) == "there"


@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.1:", "there:port", "Auto"])
def test_an_address_of_another_form_is_refused(address):
    with pytest.raises(UserError, match="neither auto nor HOST:PORT"):
        distributed.join(address, 2, 0)


# -- Real processes --------------------------------------------------------------------------------

JOIN = """
import sys
from jaxsteer.cli import __main__, common
from jaxsteer.generation import distributed
address, *numbers = sys.argv[1:]
def app():
    joined = distributed.join(address, *map(int, numbers))
    joined.meet("here")
    print(f"{joined.process} of {joined.count}")
type(common.app).__call__ = lambda self: app()
__main__.main()
"""


def joining(address: str, *numbers: int, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", JOIN, address, *map(str, numbers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
    )


def is_free(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.slow
def test_in_a_slurm_job_auto_finds_the_others():
    # What Slurm sets; JAX derives the port from the job's number.
    port = next(port for port in range(61440, 65536) if is_free(port))
    both = [
        joining(
            "auto",
            SLURM_JOB_ID=str(port - 61440),
            SLURM_STEP_NODELIST="127.0.0.1",
            SLURM_NTASKS="2",
            SLURM_PROCID=str(process),
            SLURM_LOCALID=str(process),
        )
        for process in range(2)
    ]
    said = [process.communicate() for process in both]
    assert said == [("0 of 2\n", ""), ("1 of 2\n", "")]
    assert [process.returncode for process in both] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(), (2, 2)])
def test_what_jax_refuses_is_one_line_that_says_what_to_give(numbers):
    process = joining("10.0.0.1:1234" if numbers else "auto", *numbers)
    _, said = process.communicate()
    assert process.returncode == 2 and said.count("\n") == 1
    assert "give --hosts HOST:PORT --processes N --process I" in said


@pytest.mark.slow
def test_a_process_that_waits_for_the_others_can_be_stopped():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = joining(f"127.0.0.1:{port}", 2, 0)
    tick = threading.Event()
    while process.poll() is None and is_free(port):
        tick.wait(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 143 and "stopped" in said.splitlines()[-1]
