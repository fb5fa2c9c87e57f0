"""Shares of rows, what is said when processes are missing, and real processes that wait in vain."""

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

PROMPTS = st.lists(st.sampled_from([f"p{i}" for i in range(9)]), max_size=60)


@given(PROMPTS, st.integers(1, 8))
def test_every_row_is_one_processs_and_shares_are_even(prompts, count):
    shares = [Hosts(process=p, count=count).share(prompts) for p in range(count)]
    assert Counter(row for share in shares for row in share) == Counter(range(len(prompts)))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@given(PROMPTS, st.integers(1, 8))
def test_the_rows_of_few_prompts_are_split(prompts, count):
    owners: dict[str, set[int]] = {}
    for p in range(count):
        for row in Hosts(process=p, count=count).share(prompts):
            owners.setdefault(prompts[row], set()).add(p)
    # A cut between two neighbours splits at most one prompt.
    assert sum(len(of) - 1 for of in owners.values()) <= count - 1


def test_one_process_has_all_rows_and_waits_for_nobody():
    assert distributed.ALONE.share(["a", "b", "a"]) == {0, 1, 2}
    distributed.ALONE.meet("anywhere")
    assert distributed.ALONE.seen(lambda: None) is None


def test_while_it_waits_a_process_can_say_how_far_the_others_are(monkeypatch):
    monkeypatch.setattr(distributed, "EVERY", 0.001)
    looked, enough = [], threading.Event()

    def look():
        looked.append(len(looked))
        if len(looked) == 3:
            enough.set()

    distributed._interruptibly(enough.wait, look)
    assert looked[:3] == [0, 1, 2]


def test_what_another_host_wrote_is_looked_for_until_it_shows():
    answers = iter([None, "there"])
    assert Hosts(process=1, count=2).seen(lambda: next(answers)) == "there"


def test_other_native_messages_pass_at_once():
    said = []
    lines = iter(["W1 some warning\n", "I1 more\n"])
    for text in distributed.words(lines):
        said.append((text, next(lines, None)))
    assert said[0] == ("W1 some warning\n", "I1 more\n")


def test_a_warning_of_the_service_is_not_swallowed_when_nobody_is_lost():
    lines = ["W1 coordination_service.cc:1] slow\n", "next\n"]
    assert "".join(distributed.words(lines)) == "".join(lines)


def test_all_lost_processes_are_named():
    status = "absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending "
    lines = [f"F1 client.h:80] Terminating process because the {distributed._FATAL}. {status}"]
    lines += ["heartbeats):\n", "1\n", "3\n", "The tasks have crashed.\n", "*** stack trace:\n"]
    (line,) = distributed.words(lines)
    assert line == f"jaxsteer: lost processes 1, 3; {distributed.GO_ON}\n"


def test_a_loss_in_words_we_do_not_know_is_passed_on():
    (line,) = distributed.words(
        [f"F1] the {distributed._FATAL}. absl::Status: INTERNAL: new words\n"]
    )
    assert "lost another process (INTERNAL: new words)" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("10.0.0.1",), "neither auto nor HOST:PORT"),
        (("10.0.0.1:99999", 2, 0), "neither auto nor HOST:PORT"),
        (("10.0.0.1:0", 2, 1), "neither auto nor HOST:PORT"),
        (("there:here:123", 2, 1), "neither auto nor HOST:PORT"),
        (("[::1]:1234", 2), "go together"),
        (("10.0.0.1:1234", 2), "go together"),
        (("10.0.0.1:1234",), "go together"),
        (("auto", None, 1), "go together"),
        (("10.0.0.1:1234", 2, 2), "none of 0 to 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, said):
    with pytest.raises(UserError, match=said):
        distributed.join(*arguments)


# -- Real processes, one of two or without a cluster -----------------------------------------------

JOIN = """
import sys
import jax
from jaxsteer import cli, hosts
address, processes, process, arrival = sys.argv[1:]
def app():
    numbers = (int(n) if n else None for n in (processes, process))
    joined = hosts.join(address, *numbers, arrival=int(arrival))
    joined.meet("here")
    gpus = jax.config.read("jax_cuda_visible_devices")
    print(f"{joined.process} of {joined.count}, GPUs: {gpus}")
cli.app = app
cli.main()
"""


def joining(
    address: str, processes: object = "", process: object = "", *, arrival: int = 60, **env: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", JOIN, address, str(processes), str(process), str(arrival)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
    )


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def is_free(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) != 0


def test_without_a_cluster_auto_says_what_to_give():
    process = joining("auto")
    _, said = process.communicate()
    assert process.returncode == 2 and said.count("\n") == 1
    assert "finds no TPU pod, Slurm or Open MPI job here; give --hosts HOST:PORT" in said


def test_in_a_slurm_job_auto_finds_the_others():
    # What Slurm sets; JAX makes the port from the job's number.
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
    assert said == [("0 of 2, GPUs: 0\n", ""), ("1 of 2, GPUs: 1\n", "")]
    assert [process.returncode for process in both] == [0, 0]


def test_a_process_alone_on_its_node_is_shown_all_gpus():
    port = next(port for port in range(61440, 65536) if is_free(port))
    job = {
        "SLURM_JOB_ID": str(port - 61440),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_TASKS_PER_NODE": "1",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    assert joining("auto", **job).communicate() == ("0 of 1, GPUs: all\n", "")


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "2"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "11(x2)"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,2"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        # mpirun starts its two in a step of one task.
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, None),
        # Who names them is heard.
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "JAX_LOCAL_DEVICE_IDS": "4,5"}, None),
    ],
)
def test_one_of_several_processes_on_a_node_has_the_gpus_that_jax_gives_it(
    monkeypatch, given, asked
):
    for name in (
        "SLURM_STEP_TASKS_PER_NODE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "JAX_LOCAL_DEVICE_IDS",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert distributed._devices() == asked


def test_a_port_that_is_taken_is_said():
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        process = joining(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0)
        _, said = process.communicate()
    assert process.returncode == 2
    assert said.count("\n") == 1 and "Address already in use" in said


@pytest.mark.parametrize("number", [0, 1])
def test_when_the_other_does_not_come_one_line_says_so(number):
    process = joining(free_address(), 2, number, arrival=2)
    _, said = process.communicate()
    assert process.returncode not in (0, None)
    assert said == f"jaxsteer: not all processes of this run came in time; {distributed.GO_ON}\n"


def test_a_stop_while_waiting_for_the_others_is_heard():
    address = free_address()
    process = joining(address, 2, 0)
    host, port = address.split(":")
    tick = threading.Event()
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                break
        tick.wait(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 143 and "stopped" in said.splitlines()[-1]
