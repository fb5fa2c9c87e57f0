from __future__ import annotations

import dataclasses
import io
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from jaxsteer.generation.decode import Decoding
from jaxsteer.generation.engine import Request
from jaxsteer.generation.prefill import no_probes
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.convert import convert
from jaxsteer.model.interventions import Add, Operation, Project, everywhere
from jaxsteer.model.weights import param_shapes
from tests import oracle, tiny
from tests.bench import __main__ as bench
from tests.bench import accelerator, figures, hooks, ours, peers, table, worker, workload
from tests.bench.job import Job, Site
from tests.model.test_sharding import tiny_config

# The benchmark itself is run by hand; these tests of it load several libraries.
pytestmark = pytest.mark.slow

PROMPTS = [[5, 9, 11, 4], [7, 8], [12, 30, 31, 32, 33, 6], [20, 21, 22]]
NEW = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    folder = tmp_path_factory.mktemp("tiny")
    # As the benchmark's model, which is written for the others as a Llama with a plain rope.
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    source = tiny.save(tiny.llama(rope_parameters=plain), folder / "source")
    return ChatModel.load(convert(source, folder / "model", "float32"))


def steered(model: ChatModel) -> list[list[Operation]]:
    draw = np.random.default_rng(3)
    shape = (model.config.n_layers, model.config.d_model)
    a, b = (draw.standard_normal(shape).astype(np.float32) for _ in range(2))
    return [
        [],
        [Add(direction=a, layers=(1,), scale=2.0)],
        [
            Add(direction=a, layers=(0,), scale=2.0),
            Project(directions=(a, b), layers=(1, 2), measured_at=0),
        ],
        everywhere(b, 1),
    ]


@pytest.fixture(scope="module")
def job(model: ChatModel) -> Job:
    conditions = steered(model)
    pairs = list(itertools.product(range(len(conditions)), PROMPTS))
    return Job(
        tokens=[prompt for _, prompt in pairs],
        condition=[c for c, _ in pairs],
        conditions=[workload.sites(operations) for operations in conditions],
        max_new_tokens=NEW,
        eos=list(model.eos),
        batch=4,
    )


@pytest.fixture(scope="module")
def hf(model: ChatModel, job: Job, tmp_path_factory: pytest.TempPathFactory) -> peers.Hf:
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = folder / "tokenizer"
    model.tokenizer.hf.save_pretrained(tokenizer)
    job.save(folder / "job")
    exported = workload.hf_folder(model, tokenizer, folder / "hf")
    return peers.Hf(Job.load(folder / "job"), exported)


def test_hf_one_at_a_time_gives_the_tokens_of_jaxsteer_under_every_condition(
    model: ChatModel, hf: peers.Hf, job: Job
) -> None:
    replies = oracle.ours(model, PROMPTS, steered(model), new_tokens=NEW, keep_logits=False)
    theirs = hf.run(range(len(job.tokens)), 1)
    assert theirs == [reply.tokens.tolist() for reply in replies]
    # Every condition does something, or agreement would show nothing.
    different = {tuple(map(tuple, theirs[i : i + 4])) for i in range(0, 16, 4)}
    assert len(different) == 4


@pytest.fixture(scope="module")
def work(model: ChatModel, job: Job) -> workload.Workload:
    return workload.Workload(
        names=["none", "add", "project", "everywhere"],
        requests=[
            Request(tokens=tokens, condition=c, row_id=i)
            for i, (tokens, c) in enumerate(zip(job.tokens, job.condition, strict=True))
        ],
        interventions=oracle.compiled(model, steered(model)),
        probes=no_probes(model.config),
        decoding=Decoding(max_new_tokens=NEW, eos=model.eos),
        batch=4,
        job=job,
    )


def test_some_rows_of_a_study_come_back_in_the_order_asked(
    model: ChatModel, hf: peers.Hf, work: workload.Workload
) -> None:
    rows = [13, 2, 5]
    assert ours.replies(model, work, rows, 4, work.decoding) == hf.run(rows, 1)


def test_a_long_prompt_gets_the_reply_that_hf_gives(model: ChatModel, hf: peers.Hf) -> None:
    prompt = np.random.default_rng(0).integers(3, 64, 300).tolist()
    assert ours.long_reply(model, prompt, 5) == hf.long(prompt, 5)


def test_phases_count_the_tokens_of_full_slots(
    model: ChatModel, work: workload.Workload, job: Job
) -> None:
    found = ours.phases(SimpleNamespace(model=model, work=work), 4, (1, 3))
    # Every length of the study's prompts once.
    assert found["prompt_tokens"] == 4 + 2 + 6 + 3
    assert found["new_tokens"] == 4 * 2
    assert {count: len(some) for count, some in found["all_seconds"].items()} == {1: 4, 3: 4}


def test_hf_in_padded_batches_gives_the_tokens_of_one_at_a_time(hf: peers.Hf, job: Job) -> None:
    rows = [13, 2, 5, 0, 15, 9]
    assert hf.run(rows, 3) == [hf.run([row], 1)[0] for row in rows]


def test_a_worker_answers_with_seconds_tokens_and_memory(hf: peers.Hf) -> None:
    answer = worker.answer(hf, {"do": "run", "rows": [4], "batch": 1, "new_tokens": 3})
    assert [len(reply) <= 3 for reply in answer["tokens"]] == [True]
    assert answer["seconds"] > 0 and answer["peak_bytes"] > 1e7
    json.dumps(answer)


def test_a_job_comes_back_from_its_files_as_it_was(job: Job, tmp_path: Path) -> None:
    job.save(tmp_path)
    again = Job.load(tmp_path)
    assert (again.tokens, again.condition, again.eos) == (job.tokens, job.condition, job.eos)
    for sites, others in zip(job.conditions, again.conditions, strict=True):
        assert [(s.tap, s.layer) for s in sites] == [(s.tap, s.layer) for s in others]
        for site, other in zip(sites, others, strict=True):
            for one, two in zip(
                [*site.added, *site.removed], [*other.added, *other.removed], strict=True
            ):
                np.testing.assert_array_equal(one, two)


def test_removing_directions_leaves_nothing_of_their_span() -> None:
    import torch

    draw = np.random.default_rng(0)
    removed = [draw.standard_normal(16).astype(np.float32) for _ in range(2)]
    site = Site(tap="resid_post", layer=0, added=[removed[0]], removed=removed)
    h = torch.from_numpy(draw.standard_normal((1, 5, 16)).astype(np.float32))
    left = hooks.change(site)(h).numpy() @ np.stack(removed, 1)
    np.testing.assert_allclose(left, 0, atol=1e-5)


def test_batches_hold_one_condition_and_rows_of_like_length(job: Job) -> None:
    batches = job.batches(range(16), 3)
    assert sorted(itertools.chain(*batches)) == list(range(16))
    for members in batches:
        assert len({job.condition[row] for row in members}) == 1 and len(members) <= 3
        lengths = [len(job.tokens[row]) for row in members]
        assert lengths == sorted(lengths)


@pytest.mark.parametrize(("count", "per"), [(12, 1), (32, 8), (64, 32)])
def test_a_sample_fills_batches_of_the_conditions_it_draws(count: int, per: int) -> None:
    conditions = [c for c in range(24) for _ in range(48)]
    rows = figures.sample(conditions, count, per, 0)
    assert len(rows) == len(set(rows)) == count
    drawn = [conditions[row] for row in rows]
    assert {drawn.count(c) for c in set(drawn)} == {per}
    assert rows == figures.sample(conditions, count, per, 0)
    assert rows != figures.sample(conditions, count, per, 1)


def test_a_sample_of_a_small_condition_is_all_of_it() -> None:
    assert figures.sample([0, 0, 0], 8, 64, 0) == [0, 1, 2]


def test_covering_rows_have_every_length_and_every_condition(job: Job) -> None:
    rows = bench.covering(job)
    assert {len(job.tokens[row]) for row in rows} == {2, 3, 4, 6}
    assert {job.condition[row] for row in rows} == {0, 1, 2, 3}


@pytest.mark.parametrize("power", [-0.5, 0.0, 1.0, 2.3])
def test_the_exponent_of_a_power_law_is_its_power(power: float) -> None:
    xs = [1.0, 4.0, 16.0, 64.0]
    assert figures.exponent(xs, [3 * x**power for x in xs]) == pytest.approx(power, abs=1e-12)


def test_the_exponent_of_noisy_points_is_the_slope_that_scipy_fits(
    rng: np.random.Generator,
) -> None:
    xs = np.array([1.0, 2.0, 3.0, 10.0, 40.0])
    ys = xs**1.3 * np.exp(0.2 * rng.standard_normal(5))
    expected = scipy.stats.linregress(np.log(xs), np.log(ys)).slope
    assert figures.exponent(xs.tolist(), ys.tolist()) == pytest.approx(expected)


def test_an_exponent_of_one_point_is_refused() -> None:
    with pytest.raises(ValueError, match="two different points"):
        figures.exponent([2.0, 2.0], [1.0, 1.1])


def test_work_counts_two_operations_and_four_bytes_per_weight_that_multiplies(
    smollm2: ChatModel,
) -> None:
    shapes = param_shapes(smollm2.config)
    # The table is the head here: it multiplies in decode and is only looked up in prefill.
    weights = sum(int(np.prod(shape)) for shape in shapes.values() if len(shape) == 2)
    table_size = int(np.prod(shapes["embed/embedding"]))
    work = figures.Work.of(smollm2.config, prompt=0, context=0)
    assert work.decode_flops == 2 * weights
    assert work.prefill_flops == 2 * (weights - table_size)
    assert work.weight_bytes == 4 * weights
    assert work.cache_bytes == 0
    # 30 layers, 3 heads of 64, keys and values, float32; 9 query heads score and mix.
    longer = figures.Work.of(smollm2.config, prompt=10, context=100)
    assert longer.cache_bytes == 100 * 30 * 3 * 64 * 2 * 4
    assert longer.decode_flops - work.decode_flops == 100 * 30 * 9 * 64 * 4


def test_the_decode_ceiling_is_the_slower_of_computing_and_reading() -> None:
    work = figures.Work(prefill_flops=1, decode_flops=100, weight_bytes=1000, cache_bytes=10)
    # 10 rows: 1000 operations and 1100 bytes a step.
    assert work.decode_ceiling(10, flops=1e3, bandwidth=1e6) == pytest.approx(10)
    assert work.decode_ceiling(10, flops=1e6, bandwidth=1e3) == pytest.approx(10 / 1.1)


def test_shares_are_rates_over_ceilings() -> None:
    work = {"prefill_flops": 10.0, "decode_flops": 20.0, "weight_bytes": 100.0, "cache_bytes": 0.0}
    phases = {
        "slots": 4,
        "prompt_tokens": 80,
        "prefill_s": 1.0,
        "new_tokens": 20,
        "decode_s": 1.0,
        "work": work,
    }
    ceiling = {"matmul": 1000.0, "matmul_rows": {"4": 500.0}, "read": 1e9}
    found = figures.shares(phases, [ceiling, ceiling | {"matmul": 900.0}])
    assert found["prefill"]["share"] == pytest.approx(0.8)
    assert found["decode"]["share"] == pytest.approx(20 / 50)
    assert found["decode"]["bound"] == "compute"
    assert found["decode"]["share_at_rows"] == pytest.approx(20 / 25)
    slow = figures.shares(phases, [ceiling | {"read": 100.0}])
    assert slow["decode"]["bound"] == "memory"
    assert slow["decode"]["share"] == pytest.approx(20 / 4)


def test_a_peer_is_scaled_to_the_study_by_its_rows() -> None:
    rounds = [{"rows": 10, "theirs_s": t, "ours_s": o} for t, o in ((20, 4), (30, 5), (900, 6))]
    found = figures.compared({"seconds": 60.0}, rounds, 200)
    assert found["theirs_s"] == 30 and found["ours_s"] == 5
    assert found["same_rows"] == 6
    assert found["study_s"] == 600 and found["extrapolated"]
    assert found["study"] == 10


def test_agreement_is_the_share_of_rows_with_the_same_tokens() -> None:
    assert figures.agreement([[1, 2], [3], []], [[1, 2], [3, 4], []]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("value", "least", "said"),
    [(3.0, 3.0, "met"), (2.99, 3.0, "not met"), (None, 3.0, ""), (1.0, None, "")],
)
def test_a_target_is_met_from_its_own_value_on(value, least, said) -> None:
    assert figures.verdict(value, least) == said


SMALL = accelerator.Sizes(
    batches=(4, 8),
    matrix=64,
    read=4096,
    # More tokens than the tokenizer has.
    config=dataclasses.replace(tiny_config(), vocab_size=1000),
    prompts=5,
    conditions=3,
    prefix=7,
    new_tokens=6,
    slots=4,
)


def test_an_accelerator_is_measured_in_bfloat16_at_every_batch_and_on_the_large_table(
    model: ChatModel, work: workload.Workload
) -> None:
    # On the CPU, which is a device like any other to what is measured.
    seen = []

    def replies(used: ChatModel, *of: object) -> list[list[int]]:
        seen.append(used.params["embed"]["embedding"].dtype)
        return ours.replies(used, *of)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerator, "ours", SimpleNamespace(replies=replies, phases=ours.phases))
        found = accelerator.measure(model, work, SMALL)
    assert set(seen) == {jnp.dtype(jnp.bfloat16)} and len(seen) == 4
    assert [one["slots"] for one in found["study"]] == [4, 8]
    assert all(one["new_tokens"] > 0 and one["rate"] > 0 for one in found["study"])
    for one in found["phases"]:
        # Two bytes for each weight of every matrix.
        matrices = [s for s in param_shapes(model.config).values() if len(s) == 2]
        looked_up = (
            0 if model.config.tied else int(np.prod(param_shapes(model.config)["embed/embedding"]))
        )
        weights = sum(int(np.prod(shape)) for shape in matrices) - looked_up
        assert one["measured"]["work"]["weight_bytes"] == 2 * weights
        assert {one["prefill"]["bound"], one["decode"]["bound"]} <= {"compute", "memory"}
    assert found["table"]["rows"] == 15 and found["table"]["seconds"] > 0
    json.dumps(found)


def test_without_an_accelerator_the_part_is_skipped_with_a_word(tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    run = bench.Bench(tmp_path, 1, False, console)
    run.run({"accelerator"})
    table.show(run.record, console)
    assert "GPU or TPU: skipped, JAX has only a CPU here" in console.export_text()
    assert "skipped" in json.loads((tmp_path / "bench.json").read_text())["accelerator"]


@pytest.mark.parametrize(
    ("python", "said"),
    [("nowhere/python", "no nowhere/python; `make bench` makes it"), (sys.executable, "job")],
)
def test_a_peer_that_is_absent_or_does_not_start_is_skipped_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str, said: str
) -> None:
    console = Console(width=300, record=True, file=io.StringIO())
    run = bench.Bench(tmp_path, 1, False, console)
    monkeypatch.setattr(bench, "PEERS_PYTHON", bench.ROOT / python)
    run._peer(None, *bench.PEERS[0])
    (peer,) = json.loads((tmp_path / "bench.json").read_text())["peers"]
    assert said in peer["skipped"] and peer["name"] == "hf-1"
    table.show(run.record, console)
    assert "HF + hooks, one prompt at a time: skipped, " in console.export_text()


def record() -> dict:
    peer = {
        "label": "HF",
        "batch": 8,
        "rows": 32,
        "rounds": 3,
        "theirs_s": 20.0,
        "ours_s": 5.0,
        "same_rows": 4.0,
        "study_s": 800.0,
        "extrapolated": True,
        "study": 5.5,
        "target": 5.0,
        "agreement": 1.0,
        "peak_bytes": 2e9,
    }
    share = {"rate": 400.0, "ceiling": 700.0, "bound": "compute", "share": 0.57}
    return {
        "machine": {"cpu": "a [cpu]", "cores": 2, "memory_gb": 24, "load": 0.1},
        "date": "today",
        "versions": {"jax": "1"},
        "peers": [
            peer,
            peer | {"label": "slow", "study": 4.9},
            {"label": "gone", "skipped": "not installed [here]", "target": 6.0},
        ],
        "phases": {"prefill": share, "decode": share},
        "compile": {"programs": 4, "cold_s": 14.0, "cached_s": 2.0, "later": 0},
        "accelerator": {
            "device": "a [card]",
            "study": [{"slots": n, "seconds": 9.0, "rate": 5000.0} for n in (64, 1024)],
            "phases": [{"prefill": share, "decode": share | {"bound": "memory"}}] * 2,
            "table": {"rows": 3443, "new_tokens": 150, "slots": 256, "seconds": 61.0},
            "hf": {"batch": 64, "rows": 1944, "seconds": 45.0},
        },
        "long": [
            {"tokens": 700, "theirs_s": 1.2, "ours_s": 1.5, "first_s": 9.0, "same": True},
        ],
        "small": [{"rows": 12, "batch": 8, "theirs_s": 2.0, "ours_s": 1.0}],
        "scaling": {"rows": {"exponent": 0.98, "points": [[64, 1.0], [128, 2.0]]}},
    }


def test_the_table_says_which_targets_are_met() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    table.show(record(), console)
    lines = console.export_text().splitlines()

    def line(start: str) -> str:
        return next(text for text in lines if start in text)

    assert "5x met" in line("HF")
    assert "5x not met" in line("slow")
    assert "gone: skipped, not installed [here]" in line("gone")
    assert "1x met" in line("2.00 / 1.00")
    assert "1x not met" in line("1.20 / 1.50")
    assert "50 % met" in line("decode ")
    assert "80 % not met" in line("prefill ")
    assert "<= 15 s, met" in line("Compiling")
    assert "0.98" in line("64: 1.00  128: 2.00")
    assert "on a [card]" in line("The demo study on")
    assert [cell.strip() for cell in line(" 1024 ").split("│")[2:5]] == ["9.0", "5000", "57 %"]
    assert "3443 rows of 150 new tokens, 256 slots: 61.0 s" in line("The paper's table")
    assert "all 1944 rows, batch 64: 45.0 s; jaxsteer is 5.0x" in line("HF + hooks on this")


def test_a_cold_compile_over_its_target_is_not_met() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    table.show({**record(), "compile": {**record()["compile"], "cold_s": 15.1}}, console)
    assert "<= 15 s, not met" in console.export_text()
