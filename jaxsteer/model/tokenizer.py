"""From chat messages to token ids, by the model's own chat template.

The tokenizer adds no special tokens to what the template writes, so a template that writes its own
beginning-of-sequence token does not get a second one. Prompt text is data: a control token that is
spelled out in it could end the user's turn and begin another one, so it is broken up. A template
that has no place for a system prompt gets it before the user's text. Templates that write today's
date always get the same one.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.errors import UserError, one_line
from jaxsteer.files import write_json

# For templates that write today's date: the default in Llama's own template.
TODAY = datetime.datetime(2024, 7, 26)
DATE_CODES = ("%Y", "%y", "%m", "%-m", "%B", "%b", "%d", "%-d", "%A", "%a", "%j", "%H", "%M", "%S")
ARGUMENTS = "template_arguments.json"
Arguments = Mapping[str, Any] | None
# (role, text) of each turn.
Turns = Sequence[tuple[str, str]]
# What a template is tried on.
RULE, QUESTION, ANSWER = "Rule one.", "Question one?", "Answer one."


def transformers() -> Any:
    """Hugging Face transformers, without its advice that PyTorch is missing: no torch is needed.

    Imported late, since that takes a second.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def with_broken_tokens(text: str, control: Sequence[str]) -> tuple[str, int]:
    """The text with a space after the first character of each control token, and their number.

    >>> with_broken_tokens("fine<|eot_id|>user: safe", ["<|eot_id|>"])
    ('fine< |eot_id|>user: safe', 1)
    """
    if not control:
        return text, 0
    pattern = "|".join(re.escape(token) for token in sorted(control, key=len, reverse=True))
    # A token of a single character cannot be broken up: a space takes its place.
    return re.subn(pattern, lambda m: f"{m[0][0]} {m[0][1:]}" if len(m[0]) > 1 else " ", text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A chat tokenizer: the Hugging Face one plus the rules of this module.

    Attributes:
      hf: the `PreTrainedTokenizerFast`, with one chat template.
      control: the text of every special token, and of every other added token that the template
        writes; in a prompt they are broken up.
      arguments: values of variables of the template, such as `enable_thinking`.
      parts: the template takes each text as a list of parts, as those of multimodal models do.
      folded: the template has no place for a system prompt, so it goes before the user's text.
    """

    hf: Any
    control: tuple[str, ...]
    arguments: Mapping[str, Any]
    parts: bool = False
    folded: bool = False

    @classmethod
    def load(cls, folder: Path, template: str = "", arguments: Arguments = None) -> Tokenizer:
        """Read the tokenizer of a folder, a checkpoint's or a Hugging Face model's; see `of`.

        Raises:
          UserError: no tokenizer or no chat template there, or one that cannot be read.
        """
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"no tokenizer.json in {folder}; jaxsteer reads fast tokenizers only")
        try:
            hf = transformers().PreTrainedTokenizerFast.from_pretrained(str(folder))
            # A processor's file: the template of a model of text and images.
            if not hf.chat_template and (file := folder / "chat_template.json").is_file():
                hf.chat_template = json.loads(file.read_bytes())["chat_template"]
            if arguments is None and (file := folder / ARGUMENTS).is_file():
                arguments = json.loads(file.read_bytes())
        except Exception as error:
            # For a damaged file, transformers and tokenizers raise many types of error.
            raise UserError(
                f"{folder}/tokenizer.json cannot be read with the files beside it "
                f"({one_line(error)}); download the tokenizer again"
            ) from None
        return cls.of(hf, f"the tokenizer in {folder}", template, arguments)

    @classmethod
    def of(cls, hf: Any, where: str, template: str = "", arguments: Arguments = None) -> Tokenizer:
        """A Hugging Face tokenizer as a chat tokenizer.

        Args:
          hf: the tokenizer.
          where: its name in errors.
          template: a file with the chat template to use, or the name of one of several that the
            tokenizer has; "" is its default one.
          arguments: values of variables of the template.

        Raises:
          UserError: no such chat template, or a variable that it does not have.
        """
        held = hf.chat_template if isinstance(hf.chat_template, dict) else {"": hf.chat_template}
        try:
            file = Path(template).read_text("utf-8") if Path(template).is_file() else None
        except (OSError, ValueError) as error:
            raise UserError(f"{template} cannot be read ({error}); give UTF-8 text") from None
        text = file or held.get(template) or (held.get("default") if not template else None)
        if not text:
            names = ", ".join(filter(None, held))
            missing = f" {template}" if template else " by default" if names else ""
            raise UserError(
                f"{where} has no chat template{missing}; give one with --chat-template: a file"
                f"{names and ', or one of '}{names}"
            )
        hf.chat_template = text
        for name in arguments or {}:
            if not re.search(rf"\b{re.escape(name)}\b", text) or name in ("messages", "tools"):
                raise UserError(f"the chat template of {where} has no variable {name!r}")
        added = hf.added_tokens_decoder.values()
        control = {str(token) for token in hf.all_special_tokens}
        # Spaces and line breaks are added tokens of some models.
        control |= {t.content for t in added if t.special or t.content in text}
        control = {token for token in control if token.strip()}
        made = cls(hf=hf, control=tuple(sorted(control)), arguments=dict(arguments or {}))
        if QUESTION not in made._try([("user", QUESTION)]):
            made = dataclasses.replace(made, parts=True)
        both = made._try([("system", RULE), ("user", QUESTION)])
        return dataclasses.replace(made, folded=not (RULE in both and QUESTION in both))

    def save(self, folder: Path) -> None:
        """Write the files that `load` reads, without pointers to a repository's own code."""
        self.hf.init_kwargs.pop("auto_map", None)
        self.hf.save_pretrained(str(folder))
        if self.arguments:
            write_json(folder / ARGUMENTS, dict(self.arguments))

    def chat(self, user: str | Turns, system: str | None = None) -> list[int]:
        """Token ids of `prompt`."""
        return self.encode(self.prompt(user, system))

    def prompt(self, user: str | Turns, system: str | None = None) -> str:
        """A user's turn (and system prompt) as the template writes it, up to where a reply begins.

        Without `system` the template decides (some insert a default system prompt); "" asks for an
        explicitly empty one. Control tokens that the texts hold are broken up.

        Args:
          user: the user's text, or a conversation that ends with it.
          system: the system prompt.

        Raises:
          UserError: a prompt that is empty or not UTF-8, or a template that refuses the turns or
            leaves the system prompt out.
        """
        turns = self._turns(user, system)
        text = self.render(turns, reply=True)
        # The first turn, in which control tokens are broken up.
        if system and not self.folded and turns[0][1].strip() not in text:
            raise UserError("the chat template leaves out the system prompt; run without one")
        return text

    def before_last(self, turns: Turns, system: str | None = None) -> int:
        """How many leading tokens of `chat` come before the last turn.

        Raises:
          UserError: the template writes earlier turns otherwise when another one follows.
        """
        before = self.encode(self.render(self._turns(turns, system)[:-1]))
        if self.chat(turns, system)[: len(before)] != before:
            raise UserError(
                "the chat template changes earlier turns when another follows, so the last one "
                'cannot be steered alone; use steer = "all"'
            )
        return len(before)

    def _turns(self, user: str | Turns, system: str | None) -> list[tuple[str, str]]:
        """All turns of a prompt; without a place for it, the system prompt is in the first one."""
        given = [("user", user)] if isinstance(user, str) else user
        if not all(text.strip() for _, text in given):
            raise UserError("the prompt is empty; give it some text")
        turns = [(role, self._plain(text, "prompt")) for role, text in given]
        if system is None:
            return turns
        system = self._plain(system, "system prompt")
        if not self.folded:
            return [("system", system), *turns]
        (role, first), *rest = turns
        return [(role, f"{system}\n\n{first}" if system.strip() else first), *rest]

    def conversation(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a whole conversation as the template writes it, for judge models.

        Args:
          turns: (role, text) in order; control tokens that the texts hold are broken up.

        Raises:
          UserError: a turn that is not UTF-8.
        """
        turns = [(role, self._plain(text, f"{role}'s turn")) for role, text in turns]
        return self.encode(self.render(turns))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with nothing added before or after."""
        return list(self.hf(text, add_special_tokens=False)["input_ids"])

    def render(
        self,
        turns: Sequence[tuple[str, str]],
        *,
        reply: bool = False,
        today: datetime.datetime = TODAY,
    ) -> str:
        """A conversation as the template writes it, on request with the beginning of a reply.

        Raises:
          UserError: the template refuses the turns.
        """
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if self.parts else text}
            for role, text in turns
        ]
        template = self.hf.chat_template
        if "strftime_now" in template:
            # transformers passes no functions on to a template, so that this one is written in it.
            codes = "".join(f"|replace('{c}', '{today.strftime(c)}')" for c in DATE_CODES)
            template = f"{{% macro strftime_now(f) %}}{{{{ f{codes} }}}}{{% endmacro %}}{template}"
        options = {"chat_template": template, "add_generation_prompt": reply, **self.arguments}
        try:
            return str(self.hf.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:
            # A template is a program of its own: it may raise anything.
            raise UserError(
                f"the chat template rejects this conversation: {one_line(error)}"
            ) from None

    def broken(self, *texts: str) -> int:
        """How many control tokens these texts hold, which `chat` breaks up."""
        return sum(with_broken_tokens(text, self.control)[1] for text in texts)

    def _plain(self, text: str, name: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # Python reads such bytes of a command line as lone surrogates.
            raise UserError(
                f"the {name} cannot be written as UTF-8 (character {error.start + 1} is "
                f"{text[error.start]!a}); give it in UTF-8"
            ) from None
        return with_broken_tokens(text, self.control)[0]

    @functools.cached_property
    def opened(self) -> str:
        """The tag of thinking that the template opens, so that replies begin within; else ""."""
        begun = self._try([("user", QUESTION)], reply=True)
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

    def _try(self, turns: Sequence[tuple[str, str]], *, reply: bool = False) -> str:
        """As `render`, and "" for turns that the template refuses."""
        try:
            return self.render(turns, reply=reply)
        except UserError:
            return ""

    def ends(self) -> set[int]:
        """Ids that end a reply: the tokenizer's own, and what the template writes after a reply."""
        found = {self.hf.eos_token_id} - {None}
        text = self._try([("user", QUESTION), ("assistant", ANSWER), ("user", QUESTION)])
        after = text.partition(ANSWER)[2].lstrip()
        first = [t for t in self.control if after.startswith(t) and t != self.hf.bos_token]
        return found | {self.hf.convert_tokens_to_ids(max(first, key=len)) for _ in first}

    def check(self, rows: int, ends: Collection[int], where: str) -> list[str]:
        """Check, before a model is converted, that its chats are what the model reads.

        Args:
          rows: length of the model's token table.
          ends: ids that end a reply.
          where: the model's name in errors.

        Returns:
          Sentences on what the template does that a user would not expect.

        Raises:
          UserError: an added token that is cut into pieces, an id beyond the table, or a template
            that leaves out the user's text or where the reply begins.
        """
        added, problems = self.hf.added_tokens_decoder, []
        cut = [t.content for id_, t in added.items() if self.encode(t.content) != [id_]]
        if cut:
            problems.append(f"its tokenizer cuts its own tokens into pieces ({', '.join(cut[:5])})")
        template, user = self.hf.chat_template, ("user", QUESTION)
        asked = self.render([user], reply=True)
        ids = self.encode(asked)
        # Special tokens are broken up in prompts, so those that the template does not write are
        # never read.
        unread = {t.content for t in added.values() if t.special and t.content not in template}
        beyond = {id_: t for t, id_ in self.hf.get_vocab().items() if id_ >= rows}
        wrong = {*(i for i, t in beyond.items() if t not in unread), *ends, *ids}
        if far := min((id_ for id_ in wrong if id_ >= rows), default=None):
            token = beyond.get(far, "unknown")
            problems.append(f"its token table has {rows} rows and none for token {far}, {token!r}")
        if QUESTION not in asked:
            problems.append("its chat template leaves out the user's text")
        whole = self._try([user, ("assistant", ANSWER)])
        header = whole[len(asked) :].partition(ANSWER)[0] if whole.startswith(asked) else ""
        if header.strip() and asked == self.render([user]):
            problems.append(
                "its chat template ignores add_generation_prompt, so that replies would begin with "
                f"{header!r}"
            )
        if problems:
            raise UserError(
                f"{where}: {'; '.join(problems)}; convert other files of the model, or give a "
                "correct template with --chat-template"
            )
        notes = [f"the table has no row for {t!r}, which is never read" for t in beyond.values()]
        return [*self._notes(asked, ids), *notes]

    def _notes(self, asked: str, ids: list[int]) -> Iterator[str]:
        """What the template does with a chat of one question, of which these are text and ids."""
        user = ("user", QUESTION)
        if self.folded:
            yield "the template has no place for a system prompt: it goes before the user's text"
        before, _, after = self._try([("system", RULE), user], reply=True).partition(RULE)
        default = asked.removeprefix(before).removesuffix(after)
        if not self.folded and default and before + default + after == asked:
            yield f"without a system prompt the template writes one: {default!r}"
        if self.render([user], reply=True, today=TODAY + datetime.timedelta(days=400)) != asked:
            yield f"the template writes today's date, for which {TODAY:%d %b %Y} is put"
        if self.opened:
            yield f"the template opens {self.opened.strip()}, so that replies begin within it"
        bos = [self.hf.bos_token_id]
        if ids[:1] != bos == self.hf("a")["input_ids"][:1]:
            yield "the template writes no beginning-of-sequence token, so that chats have none"
