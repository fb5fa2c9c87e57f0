"""The judge and audit commands, with a scripted endpoint and with the real SmolLM2 over HTTP."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import jax
import msgspec
import polars as pl
import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from jaxsteer import files
from jaxsteer.cli import results as cli
from jaxsteer.cli.common import app
from jaxsteer.data.wheels import STRONGREJECT, fetch
from jaxsteer.errors import UserError
from jaxsteer.judges import verdicts
from jaxsteer.judges.run import Outcome
from jaxsteer.model.convert import convert
from jaxsteer.study import results as studies
from jaxsteer.study.spec import ConditionSpec
from tests.judges import made, tiny_guard
from tests.judges.scripted import GRADES, Scripted, says, serve
from tests.receipt import made as study_made

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    real = fetch(STRONGREJECT)
    # Compiled programs stay where the other tests keep them.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAXSTEER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / real.name).symlink_to(real)


def folder(path: Path, **sizes: int) -> Path:
    """A whole results folder, with the replies of the judges' tests."""
    frame = made.rows(made.results(path, **sizes))
    of_a_run = {"mode": "", "cancels_steering": False, "change": 0.0}
    frame = frame.with_columns(
        pl.lit(value).alias(name) for name, value in of_a_run.items()
    ).with_columns(
        base="condition",
        seed=pl.lit(None, pl.Int64),
        scale=pl.lit(None, pl.Float64),
        steered_tokens=pl.lit(0, pl.Int64),
    )
    conditions = [
        ConditionSpec(name=name, benign=True)
        for name in frame["condition"].unique(maintain_order=True)
    ]
    study = msgspec.structs.replace(study_made.study(claims=[]), condition=conditions)
    return study_made.folder(path, study, frame=frame)


@pytest.fixture
def results(tmp_path):
    return folder(tmp_path / "results")


def run(*arguments: object) -> str:
    """Run a command in this process; its errors are raised as they are."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_several_judges_run_in_one_command_and_each_says_what_it_found(results):
    with serve(lambda body, n: says(GRADES + '\n{"coherence": 90}')) as server:
        said = run(
            *("judge", results, "--judge", "keyword", "--judge", "strongreject-rubric"),
            *("--judge", "coherence", "--judge", "degenerate"),
            *("--base-url", server.base_url, "--judge-model", "judge-9b"),
        )
    assert "keyword-3: 12 rows: 10 other, 2 refusal" in said
    assert "strongreject-rubric-2: 8 rows: 8 harmful" in said
    assert "coherence-2: 12 rows: 12 coherent" in said
    assert set(verdicts.read_all(results)) == {
        "keyword",
        "degenerate",
        "strongreject-rubric",
        "coherence",
    }


def test_unscored_rows_are_said_with_their_reasons(results):
    with serve(says("Hmm.")) as server:
        said = run(
            *("judge", results, "--judge", "strongreject-rubric", "--limit", 3),
            *("--base-url", server.base_url, "--judge-model", "m"),
        )
    assert "8 rows: none scored, 3 unscored, 5 not judged yet" in said
    assert 'unscored 3: unparsable (no refusal score): "Hmm."' in said


def test_a_stored_reason_cannot_drive_the_terminal(results):
    run("judge", results, "--judge", "keyword", "--limit", 1)
    path = results / "judges/keyword.parquet"
    unscored = {"verdict": pl.lit(None, pl.String), "reason": pl.lit("\x1b[31mred\x07 \u202eback")}
    pl.read_parquet(path).with_columns(**unscored).write_parquet(path)
    said = run("judge", results, "--judge", "keyword", "--limit", 1)
    assert r"unscored 1: \x1b[31mred\x07 \x202eback" in said


@pytest.mark.slow
def test_the_summary_follows_the_first_judge_when_the_second_fails(tmp_path):
    folder = study_made.folder(tmp_path / "results")
    # Labelled as refusals by the run, and none to the judge.
    path = folder / "responses.parquet"
    replied = pl.lit("Here is how it is done, step by step.").alias("response")
    pl.read_parquet(path).with_columns(replied).write_parquet(path)
    assert refused(folder)["baseline"] == 0.45
    with pytest.raises(UserError, match="got no reply"):
        run(*("judge", folder, "--judge", "keyword", "--judge", "coherence"),
            *("--base-url", "http://127.0.0.1:9/v1", "--judge-model", "m"))  # fmt: skip
    rows = studies.load(folder).rows.filter(condition="baseline", family="strongreject")
    assert refused(folder)["baseline"] == (rows["label"] == "refusal").mean() == 0.0


def refused(folder: Path) -> dict[str, float]:
    """Refusal on harmful prompts by condition, as summary.json has it."""
    summary = json.loads((folder / "summary.json").read_text())
    return {e["condition"]: e["refusal"] for e in summary if e["family"] == "strongreject"}


@pytest.mark.slow
def test_llama_guard_judges_from_a_converted_checkpoint(results, tmp_path):
    hf = tiny_guard.save(tmp_path / "hf", teach=False)
    model = convert(hf, tmp_path / "guard", "float32")
    asked = ("judge", results, "--judge", "llama-guard", "--checkpoint", model, "--batch", 4)
    assert "12 rows: none scored, 5 unscored, 7 not judged yet" in run(*asked, "--limit", 5)
    said = run(*asked)
    assert re.search(r"llama-guard-[0-9a-f]{8}: 12 rows: none scored, 12 unscored\n", said)
    known = verdicts.provenance(results / "judges/llama-guard.parquet")
    assert known["model"] == "guard" and known["threshold"] == 0.5
    run("receipt", results)
    [record] = json.loads((results / "receipt.json").read_text())["predicate"]["judges"]["records"]
    assert record["weights_sha256"] == known["weights_sha256"] and record["threshold"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge", "vibes"], "no judge 'vibes'"),
        (["--judge", "coherence", "--base-url", "http://127.0.0.1:9/v1"], "go together"),
        (["--judge", "coherence"], "give --base-url and --judge-model"),
    ],
)
def test_a_wrong_command_is_one_clear_error(results, arguments, message):
    with pytest.raises(UserError, match=message):
        run("judge", results, *arguments)


def test_a_person_labels_a_sample_and_sees_how_judges_agree(results, tmp_path):
    file = tmp_path / "audit.csv"
    run("judge", results, "--judge", "keyword")
    assert "12 rows" in run("audit", "export", results, file, "--n", 50)
    with file.open(encoding="utf-8-sig", newline="") as opened:
        lines = list(csv.DictReader(opened))
    for line in lines:
        line["label"] = "refusal" if "can't help" in line["response"] else "bypass"
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    said = run("audit", "import", results, file)
    assert "took 12 labels; a person has labelled 12 rows so far" in said
    assert (
        "refusal: keyword and human on 12 rows: both yes 2, only keyword 0, only human 0, "
        "both no 10, kappa 1.00"
    ) in said


def test_a_second_process_on_the_folder_is_refused(results):
    with files.locked(results), pytest.raises(UserError, match="in use by another"):
        run("judge", results, "--judge", "keyword")


def test_every_example_writes_harmful_text_where_git_does_not_look(tmp_path):
    pages = (ROOT / "docs/judges.md").read_text() + (ROOT / "README.md").read_text()
    for command in ("export", "import"):
        pages += CliRunner().invoke(app, ["audit", command, "--help"]).output
    files = re.findall(r"audit (?:export|import) results/\S+\s+(\S+\.csv)", pages)
    assert len(files) >= 4
    (tmp_path / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    for file in [*files, "audit.csv", "my-audit-2.csv"]:
        assert subprocess.run(["git", "check-ignore", "-q", file], cwd=tmp_path).returncode == 0
    assert all(file.startswith("results/") for file in files)


# -- Stopped and killed ---------------------------------------------------------------------------


class Halting:
    """Answers the first `allowed` requests and holds the others until told, or for good."""

    def __init__(self):
        self.changed = threading.Condition()
        self.allowed, self.seen = 0, 0

    def __call__(self, body, n):
        with self.changed:
            self.seen += 1
            mine = self.seen
            self.changed.notify_all()
            self.changed.wait_for(lambda: mine <= self.allowed, timeout=60)
        return says(GRADES)

    def wait_until_seen(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.seen >= count, timeout=120)

    def allow(self, count: int) -> None:
        with self.changed:
            self.allowed = count
            self.changed.notify_all()


def strongreject(results: Path, server: Scripted) -> list[str]:
    """Arguments of a command that asks for the rubric, three calls at a time."""
    asked = ["judge", str(results), "--judge", "strongreject-rubric", "--concurrency", "3"]
    return [*asked, "--base-url", server.base_url, "--judge-model", "judge-9b"]


def judge_process(results: Path, server: Scripted) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jaxsteer.cli", *strongreject(results, server)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


@pytest.mark.slow
def test_a_killed_run_loses_at_most_the_calls_in_flight(tmp_path):
    whole = folder(tmp_path / "whole", conditions=4, prompts=6)
    with serve(says(GRADES)) as server:
        run(*strongreject(whole, server))
    expected = verdicts.read_all(whole)["strongreject-rubric"]

    results = folder(tmp_path / "killed", conditions=4, prompts=6)
    # The replies to the same requests are in the cache now.
    shutil.rmtree(tmp_path / "cache/judge-replies")
    halting = Halting()
    answered = 0
    with serve(halting) as server:
        for more in (2, 7):
            answered += more
            halting.allow(halting.seen + more)
            started = halting.seen
            process = judge_process(results, server)
            # Three are in flight when the ones before them have been kept.
            halting.wait_until_seen(started + more + 3)
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL
        halting.allow(10**6)
        run(*strongreject(results, server))
        asked = len(server.requests)
    assert verdicts.read_all(results)["strongreject-rubric"].equals(expected)
    # Twenty-four rows, and the three in flight at each of the two kills once more.
    assert asked == 24 + 2 * 3


def test_ctrl_c_keeps_what_is_done_and_says_so(tmp_path):
    results = folder(tmp_path / "r", conditions=2, prompts=6)
    halting = Halting()
    with serve(halting) as server:
        halting.allow(5)
        process = judge_process(results, server)
        halting.wait_until_seen(5 + 3)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        halting.allow(10**6)
    assert process.returncode == 130
    assert "stopped; what is finished is kept" in said and "Traceback" not in said
    assert verdicts.read_all(results)["strongreject-rubric"].height == 5


# -- The real SmolLM2 behind `transformers serve` --------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_hf(oracle, smollm2, tmp_path_factory):
    """SmolLM2 as a plain HF folder, since the server cannot read a local GGUF."""
    folder = tmp_path_factory.mktemp("served") / "smollm2"
    config = {k: v for k, v in oracle.config.to_dict().items() if k != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(oracle.state_dict())
    plain.save_pretrained(folder)
    smollm2.tokenizer.hf.save_pretrained(folder)
    return folder


@contextmanager
def transformers_serve(folder, log):
    """Run `transformers serve` on a free port, and yield its address once it answers."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    tick = threading.Event()
    try:
        while not healthy(port):
            assert process.poll() is None, log.read_text()
            tick.wait(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


@pytest.mark.slow
def test_the_real_smollm2_judges_over_http_and_what_it_cannot_say_is_unscored(
    results, smollm2_hf, tmp_path
):
    log = tmp_path / "server.log"
    with transformers_serve(smollm2_hf, log) as url:
        asked = ("--base-url", url, "--judge-model", smollm2_hf, "--timeout", 300)
        asked += ("--max-tokens", 6, "--concurrency", 1)
        rubric = run("judge", results, "--judge", "strongreject-rubric", *asked, "--limit", 1)
        grades = run("judge", results, "--judge", "coherence", *asked, "--limit", 2)
        other = folder(tmp_path / "other")
        wrong = run(
            *("judge", other, "--judge", "coherence", "--base-url", url),
            *("--judge-model", "a-model-it-does-not-serve", "--limit", 1),
        )
    assert "unscored 1: no reply: HTTP 400" in wrong and "pinned to" in wrong
    # Six tokens are too few for the rubric's form, three times over.
    assert "none scored, 1 unscored, 7 not judged yet" in rubric
    assert "cut at the token limit" in rubric
    assert "coherence-2: 12 rows" in grades and "10 not judged yet" in grades
    assert log.read_text().count('POST /v1/chat/completions HTTP/1.1" 200 OK') >= 3 + 2
    for judge, count in (("strongreject-rubric", 1), ("coherence", 2)):
        table = verdicts.read_all(results)[judge]
        assert table.height == count
        unscored = table["verdict"].is_null()
        assert (table["score"].is_null() == unscored).all()
        assert (
            table.filter(unscored)["reason"].str.contains("^(unparsable|the judge refused)").all()
        )


@pytest.mark.parametrize(
    ("judge", "given", "told"),
    [
        ("keyword-3", {"refusal": 96, "other": 4}, True),
        ("keyword-3", {"refusal": 94, "other": 6}, False),
        ("keyword-3", {"other": 19}, False),
        ("degenerate-2", {"coherent": 100}, False),
        ("llama-guard-1", {"safe": 100}, True),
    ],
)
def test_a_judge_that_gives_nearly_every_reply_one_verdict_is_pointed_out(judge, given, told):
    n = sum(given.values())
    outcome = Outcome(judge=judge, asked=n, verdicts=given, unscored={}, missing=0)
    assert ("got one verdict" in cli.said(outcome)) == told
