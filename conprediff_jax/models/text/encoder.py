"""What the text encoders share: their interface, and the checks of their options and inputs."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

TokenIds = Int[Array, "batch length"]
Encoded = Float[Array, "batch length width"]


@runtime_checkable
class TextEncoder(Protocol):
    """What the encoders here share; each is a Flax module whose fields are a config's keys.

    Attributes:
        vocab_size: Token ids are 0 .. vocab_size - 1.
        length: Tokens of a text, padding included.
        width: Channels of an encoded token.
    """

    vocab_size: int
    length: int
    width: int

    def __call__(self, tokens: TokenIds) -> Encoded:
        """The encoded texts, float32.

        Raises:
            ValueError: If the texts are not `length` tokens long.
        """
        ...


def validate(encoder: TextEncoder) -> None:
    """Checks the sizes of an encoder.

    Raises:
        ValueError: One of them is below 1.
    """
    sizes = ("vocab_size", "length", "width", "num_layers", "num_heads", "head_channels", "hidden")
    for option, value in vars(encoder).items():
        if option in sizes and value < 1:
            raise ValueError(f"{option}={value} must be at least 1")


def check_length(encoder: TextEncoder, tokens: TokenIds) -> None:
    """Checks that texts are as long as an encoder reads them.

    Raises:
        ValueError: They are longer or shorter.
    """
    if tokens.shape[1] != encoder.length:
        raise ValueError(f"texts of {tokens.shape[1]} tokens, but length={encoder.length}")
