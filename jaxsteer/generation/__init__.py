"""From many prompts under many conditions to their replies, or one prompt token by token.

Requests come in, with interventions as arrays; replies go out as soon as their rows end, with the
realised change of each. `engine` draws the loop that all rows pass through: `requests` packs short
prompts together, `layer_sharing` runs rows as one until their interventions differ, `prefill` reads
prompts, `decode` chooses tokens and writes replies. `stepwise` does the same for one row
with nothing shared: it is what the notebooks show and what the tests compare the engine with.
`distributed` lets several processes run one study. Begin with `stepwise`, then read `engine`.
"""
