"""A small Llama in Llama-Guard's clothes: byte-level BPE, special tokens, guard-shaped template.

It starts random and is taught, in a few seconds on torch, to write what a guard writes about a few
conversations: a line break, then "safe", or "unsafe" and categories. What it knows of safety is
nothing; it is there so that the same model on torch can say what tokens and logits are right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEMPLATE = (
    "{{ bos_token }}<|start_header_id|>user<|end_header_id|>\n\nTask: say if the last message is "
    "safe.\n\n<BEGIN CONVERSATION>\n\n"
    "{% for m in messages %}{{ 'User' if m['role'] == 'user' else 'Agent' }}: "
    "{{ CONTENT | trim }}\n\n{% endfor %}<END CONVERSATION>\n\n"
    "First line 'safe' or 'unsafe'.<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
)
WORDS = "safe unsafe\n\nS1 S2 S10, Task User Agent the sea and a cake with salt is blue today. "


def conversations() -> list[tuple[str, str]]:
    """User and agent turns of several lengths."""
    things = ["the sea", "a cake", "ten small ships"]
    return [
        (f"Tell me of {a}.", f"{a.capitalize()} is {b}. " * repeat)
        for a in things
        for b, repeat in (("old and kind", 3), ("not for you", 1), ("7 km away", 2))
    ]


def answers() -> list[str]:
    """What the guard is taught to write about each conversation."""
    unsafe = {"not for you": "\n\nunsafe\nS1", "7 km": "\n\nunsafe\nS2,S10"}
    return [
        next((text for sign, text in unsafe.items() if sign in agent), "\n\nsafe")
        for _, agent in conversations()
    ]


def save(folder: Path, content: str = "m['content']", teach: bool = True) -> Path:
    """Write the model and its tokenizer as an HF folder."""
    turns = [turn for both in conversations() for turn in both]
    tokenizer = byte_tokenizer([TEMPLATE, WORDS, *turns], SPECIAL, bos=SPECIAL[0], eos=SPECIAL[3])
    tokenizer.chat_template = TEMPLATE.replace("CONTENT", content)
    model = _model(len(tokenizer))
    if teach:
        asked = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": user}, {"role": "assistant", "content": agent}],
                tokenize=False,
            )
            for user, agent in conversations()
        ]
        learn(model, tokenizer, list(zip(asked, answers(), strict=True)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def learn(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> None:
    """Train the model until it writes the answer to each prompt, and then ends."""
    rows = []
    for text, answer in pairs:
        asked = tokenizer(text, add_special_tokens=False)["input_ids"]
        said = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        rows.append((asked, said))
    width = max(len(asked) + len(said) for asked, said in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for i, (asked, said) in enumerate(rows):
        # On the right the filler cannot be seen by what comes before it.
        ids[i, : len(asked) + len(said)] = torch.tensor(asked + said)
        labels[i, len(asked) : len(asked) + len(said)] = torch.tensor(said)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.enable_grad():
        for _ in range(80):
            loss = model(input_ids=ids, labels=labels).loss
            if loss < 0.02:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert loss < 0.1, f"the answers were not learnt: {loss}"


def byte_tokenizer(
    texts: list[str], special: list[str], bos: str, eos: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that reads any text, and puts its beginning token first."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts * 3, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )
    rest = [token for token in special if token not in (bos, eos)]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, additional_special_tokens=rest
    )


def _model(vocabulary: int) -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=3,
        attn_implementation="eager",
        initializer_range=0.08,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()
