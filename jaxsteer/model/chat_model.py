"""A chat model ready to run: graph, parameters, tokenizer and identity in one value."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import msgspec
from flax import nnx
from jax.sharding import Mesh

from jaxsteer.files import sha256_bytes
from jaxsteer.model import checkpoint
from jaxsteer.model.checkpoint import Manifest
from jaxsteer.model.config import ModelConfig
from jaxsteer.model.decoder import Decoder, Params, graph
from jaxsteer.model.sharding import param_shardings
from jaxsteer.model.tokenizer import Tokenizer


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
      manifest: the checkpoint's manifest: where it came from, and every hash.
      mesh: the devices that its parameters are spread over; None for one device.
    """

    name: str
    config: ModelConfig
    definition: nnx.GraphDef[Decoder]
    params: Params
    tokenizer: Tokenizer
    eos: tuple[int, ...]
    weights_sha256: str
    tokenizer_sha256: str
    manifest: Manifest
    mesh: Mesh | None = None

    @classmethod
    def load(cls, folder: Path, *, verify: bool = True, mesh: Mesh | None = None) -> ChatModel:
        """Load a converted checkpoint, onto a mesh piece by piece.

        Raises:
          UserError: not a checkpoint, or a file that does not match the manifest.
        """
        shardings = None if mesh is None else functools.partial(param_shardings, mesh=mesh)
        loaded = checkpoint.load(folder, verify=verify, shardings=shardings)
        dtype = loaded.params["embed"]["embedding"].dtype
        return cls(
            name=folder.name,
            config=loaded.config,
            definition=graph(loaded.config, dtype),
            params=loaded.params,
            tokenizer=Tokenizer.load(loaded.tokenizer_dir),
            eos=tuple(loaded.manifest.eos_token_ids),
            weights_sha256=loaded.manifest.weights_sha256,
            tokenizer_sha256=loaded.manifest.tokenizer_sha256,
            manifest=loaded.manifest,
            mesh=mesh,
        )

    def identity(self) -> dict[str, Any]:
        """Everything a result needs to name the model, JSON-able; digests are hex sha256."""
        return {
            "name": self.name,
            "weights_sha256": self.weights_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
            "template_sha256": sha256_bytes(self.tokenizer.hf.chat_template.encode()),
            "config_sha256": self.manifest.config_sha256,
            "dtype": self.manifest.dtype,
            "source": msgspec.to_builtins(self.manifest.source),
        }
