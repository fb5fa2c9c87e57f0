"""How tests check jaxtyping's shapes: beartype, which takes an int where a float is asked."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
