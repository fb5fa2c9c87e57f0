"""From chat messages to token ids, by the model's own chat template.

The tokenizer adds no special tokens to what the template writes, so a template that writes its own
beginning-of-sequence token does not get a second one. Prompt text is data: if it contains one of
the tokenizer's special tokens it is refused, because that token could end the user's turn and begin
another one.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.errors import UserError, one_line

# Templates that write today's date get this one, the default in Llama's own template.
TODAY = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"


def transformers() -> Any:
    """Hugging Face transformers, without its advice that PyTorch is missing: no torch is needed.

    Imported late, since that takes a second.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A chat tokenizer: the Hugging Face one plus the rules of this module.

    Attributes:
      hf: the `PreTrainedTokenizerFast`.
      special: the text of every special token; prompts may not contain any of them.
    """

    hf: Any
    special: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json and the chat template of a checkpoint's tokenizer folder.

        Raises:
          UserError: no tokenizer or no chat template there, or one that cannot be read.
        """
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"no tokenizer.json in {folder}; jaxsteer reads fast tokenizers only")
        try:
            hf = transformers().PreTrainedTokenizerFast.from_pretrained(str(folder))
        except Exception as error:
            # For a damaged file, transformers and tokenizers raise many types of error.
            raise UserError(
                f"{folder}/tokenizer.json cannot be read with the files beside it "
                f"({one_line(error)}); download the tokenizer again"
            ) from None
        return cls.of(hf, str(folder))

    @classmethod
    def of(cls, hf: Any, where: str) -> Tokenizer:
        """A Hugging Face tokenizer as a chat tokenizer.

        Raises:
          UserError: it has no chat template.
        """
        if not hf.chat_template:
            raise UserError(f"the tokenizer in {where} has no chat template; convert a chat model")
        special = {str(token) for token in hf.all_special_tokens}
        special |= {t.content for t in hf.added_tokens_decoder.values() if t.special}
        return cls(hf=hf, special=tuple(sorted(special)))

    def save(self, folder: Path) -> None:
        """Write the files that `load` reads, without pointers to a repository's own code."""
        self.hf.init_kwargs.pop("auto_map", None)
        self.hf.save_pretrained(str(folder))

    def chat(self, user: str, system: str | None = None) -> list[int]:
        """Token ids of one user turn (and system prompt) up to where the reply begins.

        Without `system` the template decides (some insert a default system prompt); "" asks for an
        explicitly empty one.

        Raises:
          UserError: an empty prompt, one that contains a special token or is not UTF-8, or a
            template that refuses the turns or leaves the system prompt out.
        """
        if not user.strip():
            raise UserError("the prompt is empty; give it some text")
        self._check((user, "prompt"), (system or "", "system prompt"))
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": user})
        text = self._template(messages, add_generation_prompt=True)
        if system and system.strip() not in text:
            raise UserError("the chat template leaves out the system prompt; run without one")
        return list(self.hf(text, add_special_tokens=False)["input_ids"])

    def conversation(self, turns: Sequence[tuple[str, str]], *, parts: bool = False) -> list[int]:
        """Token ids of a whole conversation as the template writes it, for judge models.

        Args:
          turns: (role, text) in order.
          parts: give the template each text as a list of parts, as multimodal models need it.

        Raises:
          UserError: a turn that contains a special token or is not UTF-8.
        """
        self._check(*((text, f"{role}'s turn") for role, text in turns))
        return list(self.hf(self.render(turns, parts=parts), add_special_tokens=False)["input_ids"])

    def render(self, turns: Sequence[tuple[str, str]], *, parts: bool = False) -> str:
        """A conversation as the template writes it; see `conversation`."""
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
            for role, text in turns
        ]
        return self._template(messages)

    def _template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """Render messages by the template, always with the same date."""
        from jinja2 import TemplateError

        template = self.hf.get_chat_template()
        if "strftime_now" in template:
            template = TODAY + template
        try:
            return str(
                self.hf.apply_chat_template(
                    messages, chat_template=template, tokenize=False, **options
                )
            )
        except TemplateError as error:
            raise UserError(
                f"the chat template rejects this conversation: {one_line(error)}"
            ) from None

    def _check(self, *texts: tuple[str, str]) -> None:
        for text, name in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                # Python reads such bytes of a command line as lone surrogates.
                raise UserError(
                    f"the {name} cannot be written as UTF-8 (character {error.start + 1} is "
                    f"{text[error.start]!a}); give it in UTF-8"
                ) from None
            found = [token for token in self.special if token in text]
            if found:
                raise UserError(
                    f"the {name} holds the special token {found[0]!r}, which could end its "
                    "turn; remove it"
                )

    @functools.cached_property
    def opened(self) -> str:
        """The tag of thinking that the template opens, so that replies begin within; else ""."""
        begun = self._template([{"role": "user", "content": "x"}], add_generation_prompt=True)
        found = re.search(r"<(?:think|thinking|thought|reasoning)>\s*$", begun)
        return found[0] if found else ""

    def reply(self, ids: list[int] | np.ndarray) -> str:
        """Text of a reply, with the tag of thinking that the template opened before it.

        So the text alone shows whether the thinking was ever closed.
        """
        return self.opened + self.decode(ids)

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """Text of the ids, special tokens left out."""
        return str(self.hf.decode(list(map(int, ids)), skip_special_tokens=True))
