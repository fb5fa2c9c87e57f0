"""Benchmarks: jaxsteer's demo study beside the same rows in other libraries (`make bench`).

    __main__   starts everything, one process at a time, and writes results/bench/bench.json
    workload   the demo study's rows, as jaxsteer runs them and as a job for anybody
    job        what a process of another library is given: tokens and vectors, in JSON and npz
    worker     a process with one library loaded, which runs rows on request
    ours, peers, hooks   the libraries behind the worker
    ceilings, scaling    what the machine can do, and how cost grows
    figures, table       medians, exponents and verdicts; what is printed

The modules that a peer's process imports (job, worker, peers, hooks) import no jaxsteer: peers
live in an environment of their own.
"""
