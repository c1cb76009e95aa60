"""The contract that text encoders keep, and checks of their options and inputs."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

TokenIds = Int[Array, "batch length"]
Encoded = Float[Array, "batch length width"]


@runtime_checkable
class TextEncoder(Protocol):
    """A Flax module that encodes texts. Its fields are the keys of the `text.encoder` section.

    Attributes:
        vocab_size: The number of token ids, which are 0 .. vocab_size - 1.
        length: The number of tokens of a text, with padding.
        width: The number of channels of an encoded token.
    """

    vocab_size: int
    length: int
    width: int

    def __call__(self, tokens: TokenIds) -> Encoded:
        """Returns the encoded texts, float32.

        Raises:
            ValueError: The texts do not have `length` tokens.
        """
        ...


def validate(encoder: TextEncoder) -> None:
    """Checks the sizes of an encoder.

    Raises:
        ValueError: A size is below 1.
    """
    sizes = ("vocab_size", "length", "width", "num_layers", "num_heads", "head_channels", "hidden")
    for option, value in vars(encoder).items():
        if option in sizes and value < 1:
            raise ValueError(f"{option}={value} must be at least 1")


def check_length(encoder: TextEncoder, tokens: TokenIds) -> None:
    """Checks that texts have the length that an encoder reads.

    Raises:
        ValueError: The texts are longer or shorter.
    """
    if tokens.shape[1] != encoder.length:
        raise ValueError(f"texts of {tokens.shape[1]} tokens, but length={encoder.length}")
