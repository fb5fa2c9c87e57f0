"""A chat model ready to run: graph, parameters, tokenizer and identity in one value."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flax import nnx

from jaxsteer import checkpoint
from jaxsteer.chat import Tokenizer
from jaxsteer.config import ModelConfig
from jaxsteer.model import Decoder, Params, graph


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatModel:
    """What every run needs of a model.

    Attributes:
      name: the checkpoint folder's name, for tables.
      config: architecture and sizes.
      definition: the Flax graph, static in jitted functions.
      params: parameters as a nested dict of arrays.
      tokenizer: chat tokenizer.
      eos: token ids that end a reply.
      weights_sha256: identity of the parameters.
      tokenizer_sha256: identity of tokenizer and chat template.
    """

    name: str
    config: ModelConfig
    definition: nnx.GraphDef[Decoder]
    params: Params
    tokenizer: Tokenizer
    eos: tuple[int, ...]
    weights_sha256: str
    tokenizer_sha256: str

    @classmethod
    def load(cls, folder: Path, *, verify: bool = True) -> ChatModel:
        """Load a converted checkpoint.

        Raises:
          UserError: not a checkpoint, or a file that does not match the manifest.
        """
        loaded = checkpoint.load(folder, verify=verify)
        dtype = loaded.params["embed"]["embedding"].dtype
        return cls(
            name=folder.name,
            config=loaded.config,
            definition=graph(loaded.config, dtype),
            params=loaded.params,
            tokenizer=Tokenizer.load(loaded.tokenizer_dir),
            eos=tuple(loaded.eos_token_ids),
            weights_sha256=loaded.manifest["weights_sha256"],
            tokenizer_sha256=loaded.manifest["tokenizer_sha256"],
        )
