"""Captions as the condition of a diffusion model."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from conprediff_jax.common.keys import derived, fixed, switch
from conprediff_jax.data import Tokenizer

TokenIds = Int[Array, "batch length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextCondition:
    """The `text` section of a model that reads captions.

    Attributes:
        encoder: The text encoder.
        weights: Folder of a `transformers` checkpoint, whose weights the encoder keeps; empty for
            an encoder that is trained together with the denoiser.
        tokenizer: File or folder of a tokenizer, see `Tokenizer.from_file`; empty for a vocabulary
            of at most `encoder.vocab_size` tokens that is learned from the captions.
        vocabulary: JSON text of the tokenizer; filled in when a run begins.
        prompts: Captions of the images in sample grids, over and over.

    Raises:
        ValueError: There are no prompts, or the vocabulary and the encoder do not fit each other.
    """

    encoder: nn.Module = derived()
    weights: str = switch("")
    tokenizer: str = ""
    vocabulary: str = fixed("")
    prompts: tuple[str, ...] = ("",)

    def __post_init__(self):
        if not self.prompts:
            raise ValueError("prompts are (): give at least one, for the sample grids")
        if not self.vocabulary:
            return
        for name in ("length", "vocab_size"):
            theirs, ours = getattr(self.tokenize, name), getattr(self.encoder, name)
            if theirs > ours or (name == "length" and theirs != ours):
                raise ValueError(f"the tokenizer's {name} is {theirs}, the encoder's {ours}")

    @property
    def has_fixed_weights(self) -> bool:
        """Whether the encoder's weights are fixed, and not trained."""
        return bool(self.weights)

    @functools.cached_property
    def tokenize(self) -> Tokenizer:
        """The tokenizer, from captions to token ids."""
        return Tokenizer.from_json(self.vocabulary)

    def captions_for(self, num: int, captions: Sequence[str] = ()) -> list[str]:
        """A number of captions: `captions`, or else `prompts`, over and over."""
        return list(itertools.islice(itertools.cycle(captions or self.prompts), num))

    @property
    def empty(self) -> Int[Array, "1 length"]:
        """Token ids of the empty caption."""
        return jnp.asarray(self.tokenize([""]))

    def init(self, rng: Array) -> Any:
        """Initial parameters of the encoder."""
        return self.encoder.init(rng, jnp.zeros((1, self.encoder.length), jnp.int32))["params"]

    def encode(self, params: Any, tokens: TokenIds) -> Float[Array, "batch length width"]:
        """Encoded captions, which cross-attention reads; float32."""
        return self.encoder.apply({"params": params}, tokens)
