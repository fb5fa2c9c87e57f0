"""What a study's rows show: its claims, the controls that could break them, and tables to draw.

A results folder comes in, read by `study.results`; verdicts, measured controls and small tables
go out, to the receipt and the notebooks. `outcomes` counts labels, compares two conditions prompt
by prompt, and says what steering costs on benign prompts. `comparisons` counts what a study planned
to compare, and `claims` judges it and says what it could show. `controls` finds the controls of a
condition by its operations and measures them; `findings` puts them next to the claims, and judges
the claims again under other rules. `layer_windows` tabulates the rows, `reliability` and `cosines`
the directions; `lesson` serves the first notebook, and `charts` draws. Begin reading with
`outcomes`, then `claims`.
"""
