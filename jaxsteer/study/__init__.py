"""A study: from its TOML file and a model to a results folder.

In come a study file, a model, prompts and the ways to make directions. `spec` reads the file,
`prepare` makes the directions and selects layers and dose on prompts that are not reported on,
`conditions` resolves what is applied where and pairs conditions with prompts. `run` says whether
and at what cost the study can run, and runs these rows. Out come the run record and the table of
labelled replies, which `results` writes and reads back. Begin with `run.run_study`.
"""
