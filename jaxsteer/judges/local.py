"""Judges that are models and run here, by this package's own code, each described by a TOML.

A judge is a converted checkpoint, a template, what is put into the template, and how the answer is
read. data/judges has those that are shipped; docs/judges.md explains every key.

    tokens   score = sum over the named tokens t of p(t) value(t), with p the softmax of their
             logits alone, at the first token that is not white space. Of two tokens with the
             values 0 and 1 that is a probability, of "1" to "5" an expected grade. One forward
             pass, unless the judge writes white space first or its reasons are wanted
    words    the verdict of the first of some texts that begins a line of the greedy answer

Prompts and replies are data: a special token of the judge spelled out in one would end it, so a
space is put after the token's first character, and the reason says so. A reply that addresses the
judge in plain words ("the above is safe") is not detected.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from msgspec import Meta
from scipy.special import logsumexp, softmax

from jaxsteer.data import prompts
from jaxsteer.errors import UserError, one_line
from jaxsteer.files import sha256_bytes, sha256_json
from jaxsteer.generation import engine
from jaxsteer.generation.decode import Decoding
from jaxsteer.generation.requests import BUCKETS
from jaxsteer.judges import rules
from jaxsteer.judges.rubrics import filled
from jaxsteer.judges.verdicts import OTHERS, Finding, Findings, Item, JudgeRecord
from jaxsteer.model import chat_model
from jaxsteer.model.chat_model import ChatModel
from jaxsteer.model.tokenizer import with_broken_tokens
from jaxsteer.words import percent, plain

SHIPPED = prompts.HERE / "judges"
CHAT = "chat"
PARTS, ROLES = {"prompt", "reply", "policy"}, {"system", "user", "assistant"}
Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[int, Meta(ge=1)]


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the structs of a judge's TOML: an unknown key is an error, never ignored."""


class Tokens(Spec, frozen=True, kw_only=True, tag="tokens", tag_field="kind"):
    """Read the score from the probabilities of some tokens.

    Attributes:
      tokens: the score that each stands for, by the token's text in the vocabulary.
      threshold: a higher score is harmful.
      least: the share of the whole distribution that the tokens must hold, or the reply stays
        unscored: less of it means a wrong template or checkpoint.
      new_tokens: tokens that the judge may write.
    """

    tokens: Annotated[dict[str, Share], Meta(min_length=2)]
    threshold: Share
    least: Share = 0.5
    new_tokens: Positive = 1


class Words(Spec, frozen=True, kw_only=True, tag="words", tag_field="kind"):
    """Read the verdict from the text of the answer.

    Attributes:
      words: verdicts by what a line of the answer begins with, in any case; the first text that is
        found decides.
      new_tokens: tokens that the judge may write.
    """

    words: Annotated[dict[str, Literal["harmful", "harmless", "refusal"]], Meta(min_length=2)]
    new_tokens: Positive


class JudgeSpec(Spec, frozen=True, kw_only=True):
    """A judge's TOML.

    Attributes:
      fields: what is put into the template: {prompt}, {reply} and {policy}, with text around them,
        by the template's names, or by the roles of a conversation.
      read: how the answer is read.
      about: which replies are judged: all, or those to harmful prompts.
      checkpoint: its folder, relative to the file; "" is given on the command line.
      template: a file, relative to the TOML: Jinja (.jinja), or plain text with names in braces;
        `chat` is the checkpoint's chat template; "" is given on the command line.
      source: where the template is published, for the message that it is missing.
      ends: what the template ends with, after its last character that is not white space.
      reply_tokens: most tokens of a reply that are shown: its first, or if negative its last; 0 is
        all of it.
    """

    fields: dict[str, str]
    read: Tokens | Words
    about: Literal["all", "harmful"] = "all"
    checkpoint: str = ""
    template: str = ""
    source: str = "its template"
    ends: str = ""
    reply_tokens: int = 0


def _problems(name: str, spec: JudgeSpec, template: str, jinja: bool) -> Iterator[str]:
    """What is wrong with a judge's files, in words that say how to mend it."""
    put = set(re.findall(r"\{(\w*)\}", " ".join(spec.fields.values())))
    places = {name for name in spec.fields if (name if jinja else f"{{{name}}}") in template}
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) or name in OTHERS:
        yield f"a judge cannot be called {name!r}; give the file another name, such as my-judge"
    if put - PARTS or "reply" not in put:
        yield "fields: put {reply} into one, and no other names than {prompt}, {reply} and {policy}"
    if missing := sorted(set(spec.fields) - (places if template else ROLES)):
        where = "template" if template else "conversation, whose roles are system, user, assistant"
        yield f"fields: {missing[0]} has no place in the {where}; correct one of the two"
    if isinstance(spec.read, Words):
        if "harmful" not in spec.read.words.values():
            yield "read.words: no text stands for harmful; add one"
    elif not min(spec.read.tokens.values()) <= spec.read.threshold < max(spec.read.tokens.values()):
        yield "read.threshold: every score is on one side of it; put it between the tokens' scores"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalJudge:
    """A judge ready to judge.

    Attributes:
      name: of its file.
      spec: what the file says.
      template: the text of its template; "" for the checkpoint's chat template.
      jinja: whether that is a Jinja template.
      model: its checkpoint.
      ids: the vocabulary's ids of the tokens that are read, in the order of the spec.
      policy: the policy that the replies were given under.
    """

    name: str
    spec: JudgeSpec
    template: str
    jinja: bool
    model: ChatModel
    ids: tuple[int, ...]
    policy: str

    def record(self) -> JudgeRecord:
        """The judge's name, its version by hash, and all that can change a verdict."""
        spec = msgspec.to_builtins(self.spec) | {"checkpoint": "", "template": "", "source": ""}
        version = sha256_json([spec, self.template])
        shown = self.policy if "{policy}" in str(self.spec.fields) else ""
        settings = {
            "toml_and_template_sha256": version,
            "threshold": spec["read"].get("threshold"),
            "policy_sha256": sha256_bytes(shown.encode()),
            "model": self.model.name,
            "weights_sha256": self.model.weights_sha256,
            "tokenizer_sha256": self.model.tokenizer_sha256,
        }
        about = self.spec.about
        return JudgeRecord(name=self.name, version=version[:8], settings=settings, about=about)

    def prompt(self, item: Item) -> tuple[list[int], int]:
        """Token ids that ask about one reply, and the number of special tokens broken up.

        Raises:
          UserError: a template that fails.
        """
        tokenizer, most = self.model.tokenizer, self.spec.reply_tokens
        added = (token.content for token in tokenizer.hf.added_tokens_decoder.values())
        control = [*tokenizer.control, *(t for t in added if t.strip() and t in self.template)]
        parts, broken = {"prompt": item.prompt, "reply": item.response, "policy": self.policy}, 0
        for part, said in parts.items():
            parts[part], count = with_broken_tokens(said, control)
            broken += count
        ids = tokenizer.encode(parts["reply"])
        cut = ids[:most] if most > 0 else ids[most:]
        if len(cut) < len(ids):
            parts["reply"] = tokenizer.decode(cut)
        fields = {name: filled(value, parts) for name, value in self.spec.fields.items()}
        if not self.template:
            return tokenizer.encode(tokenizer.render(list(fields.items()), reply=True)), broken
        ids, bos = tokenizer.encode(self._rendered(fields)), tokenizer.hf.bos_token_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids], broken

    def _rendered(self, fields: dict[str, str]) -> str:
        if not self.jinja:
            return filled(self.template, fields)
        strict = SandboxedEnvironment(keep_trailing_newline=True, undefined=StrictUndefined)
        try:
            return strict.from_string(self.template).render(fields)
        except Exception as error:
            # A template is a program of its own: it may raise anything.
            why = one_line(error)
            raise UserError(f"the template of {self.name} fails ({why}); correct it") from None

    def ask(self, items: Sequence[Item], *, batch: int = 8) -> Iterator[Findings]:
        """Yield findings in batches as they finish, in any order."""
        new_tokens = self.spec.read.new_tokens
        limit = min(self.model.config.max_position - new_tokens, BUCKETS[-1])
        fitting, requests = [], []
        for item in items:
            ids, broken = self.prompt(item)
            if len(ids) > limit:
                yield [(item.row_id, Finding(reason=f"{len(ids)} tokens, the judge takes {limit}"))]
            else:
                fitting.append((item.row_id, broken))
                requests.append(engine.Request(tokens=ids))
        eos, keep = self.model.eos, isinstance(self.spec.read, Tokens)
        decoding = Decoding(max_new_tokens=new_tokens, eos=eos, keep_logits=keep)
        for replies in engine.run(self.model, requests, None, decoding, batch=batch):
            yield [
                (fitting[reply.index][0], self.read(reply, fitting[reply.index][1]))
                for reply in replies
            ]

    def read(self, reply: engine.Reply, broken: int = 0) -> Finding:
        """Read the judge's answer to a prompt in which so many special tokens were broken up."""
        text, read = rules.answer(reply.text).strip(), self.spec.read
        found = Finding(reason=f"the judge wrote {plain(text[:40])!r}")
        if isinstance(read, Words):
            found = read_words(text, read) or found
        else:
            assert reply.logits is not None
            decode, values = self.model.tokenizer.decode, np.array(list(read.tokens.values()))
            step = next((i for i, t in enumerate(reply.tokens) if decode([int(t)]).strip()), 0)
            score, share = expected(reply.logits[step], np.array(self.ids), values)
            if share >= read.least:
                verdict = "harmful" if score > read.threshold else "harmless"
                reasons = plain(" ".join(text.split()[1:]))[:60]
                found = Finding(score=score, verdict=verdict, reason=reasons)
            else:
                reason = f"its tokens hold {percent(share)} of the probability; {found.reason}"
                found = Finding(reason=reason)
        notes = [found.reason, f"{broken} special tokens broken up" if broken else ""]
        return dataclasses.replace(found, reason="; ".join(filter(None, notes)))


def load(
    source: str,
    *,
    checkpoint: Path | None = None,
    template: Path | None = None,
    policy: str = "",
    mesh: Mesh | None = None,
) -> LocalJudge:
    """Read a judge's TOML, its template, and its checkpoint, sharded over a mesh if one is given.

    Args:
      source: the TOML's path, or the name of one that is shipped.
      checkpoint: a checkpoint's folder instead of the TOML's.
      template: a file instead of the TOML's.
      policy: the policy that the replies were given under.
      mesh: devices.

    Raises:
      UserError: no such file, a key, value or template that makes no sense, no checkpoint, or a
        token that is not in the checkpoint's vocabulary.
    """
    path, text = Path(source) if source.endswith(".toml") else SHIPPED / f"{source}.toml", ""
    try:
        spec = msgspec.toml.decode(path.read_bytes(), type=JudgeSpec)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: {one_line(error)}; docs/judges.md lists the keys") from None
    file = template or path.parent / spec.template
    chat, jinja = template is None and spec.template == CHAT, file.suffix == ".jinja"
    if not chat:
        try:
            text = file.read_text("utf-8").rstrip() + spec.ends
            if not text.strip():
                raise OSError(f"{file} is empty")
        except (UnicodeDecodeError, OSError) as error:
            mend = f"give {spec.source}, saved in a file, as --template"
            raise UserError(f"{path}: no template ({one_line(error)}); {mend}") from None
    if problems := list(_problems(path.stem, spec, text, jinja)):
        raise UserError(f"{path}: {'; '.join(problems)}")
    if checkpoint is None and not spec.checkpoint:
        raise UserError(f"judge {path.stem} is a model; give its checkpoint as --checkpoint")
    found = chat_model.find(checkpoint or path.parent / spec.checkpoint)
    model = ChatModel.load(found, mesh=mesh)
    vocabulary = model.tokenizer.hf.get_vocab()
    tokens = spec.read.tokens if isinstance(spec.read, Tokens) else {}
    lacks = [f"the token {token!r}" for token in tokens if token not in vocabulary]
    if chat:
        roles = {role: f"text of the {role}" for role in spec.fields}
        shown = model.tokenizer.render(list(roles.items()))
        lacks += [f"the {said} in its chats" for said in roles.values() if said not in shown]
    if lacks:
        mend = "give the checkpoint that the judge is made for"
        raise UserError(f"{path}: {model.name} lacks {lacks[0]}; {mend}")
    return LocalJudge(
        name=path.stem,
        spec=spec,
        template=text,
        jinja=jinja,
        model=model,
        ids=tuple(vocabulary[token] for token in tokens),
        policy=policy,
    )


def expected(
    logits: Float[np.ndarray, " vocab"],
    ids: Int[np.ndarray, " token"],
    values: Float[np.ndarray, " token"],
) -> tuple[float, float]:
    """The expected value over some tokens, and their share of the whole distribution.

    >>> expected(np.array([0.0, 3.0, 3.0]), np.array([1, 2]), np.array([0.0, 1.0]))[0]
    0.5
    """
    wide = logits.astype(np.float64)
    share = np.exp(logsumexp(wide[ids]) - logsumexp(wide))
    return float(softmax(wide[ids]) @ values), float(share)


def read_words(answer: str, read: Words) -> Finding | None:
    """The verdict that an answer's lines give, or None if none of the texts begins one.

    >>> words = {"Refusal: yes": "refusal", "Harm: yes": "harmful", "Harm: no": "harmless"}
    >>> read_words("refusal: no\\nharm: Yes", Words(words=words, new_tokens=9)).verdict
    'harmful'
    """
    lines = [line.strip().casefold() for line in answer.splitlines()]
    for begins, verdict in read.words.items():
        pattern = re.compile(re.escape(begins.casefold()) + r"(?!\w)")
        if any(map(pattern.match, lines)):
            score = float(verdict == "harmful")
            return Finding(score=score, verdict=verdict, reason=plain("; ".join(lines))[:120])
    return None
