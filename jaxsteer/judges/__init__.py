"""From replies to labels.

In come the rows of a study, each with its prompt and reply; out come verdicts, one file per judge,
and one label per row. `verdicts.decide` is the rule that turns verdicts into a label, so begin
reading there; then `rules`, which label a run as it goes, and `run`, which runs the other judges
later: models that run here (`local`) or behind an endpoint (`rubrics`, `client`), or a person
(`human`).
"""
