"""The `sampling` sections of models of tokens."""

import dataclasses

from conprediff_jax.diffusion.categorical import CategoricalProcess
from conprediff_jax.diffusion.masked import MaskedProcess
from conprediff_jax.diffusion.samplers import CategoricalSampler, MaskedSampler
from conprediff_jax.sampling.spec.base import SAMPLINGS, SamplingSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class RevealSampling(SamplingSpec):
    """The settings that samplers of tokens share.

    Attributes:
        truncation: Share of the mass of a token's distribution that is kept, in (0, 1].
        reveal: How tokens are revealed.
    """

    steps: int = 100
    truncation: float = 1.0
    reveal: str = "posterior"

    def describe(self) -> str:
        """As in the base class, with the way in which tokens are revealed."""
        return f"{self.reveal} tokens, {super().describe()}"


@SAMPLINGS.register("mask_and_replace")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSampling(RevealSampling):
    """The `sampling` section of mask-and-replace diffusion; see `CategoricalSampler`.

    Attributes:
        reveal: How tokens are revealed: 'posterior', 'random' (high-quality inference) or 'purity'.
        tokens_per_call: Largest number of tokens that one call reveals; 0 for no limit.
        purity_weight: How much more sharply purer tokens are drawn; only for 'purity'.
        purity_temperature: 1 chooses tokens in proportion to their purity, 0 chooses the purest;
            only for 'purity'.
    """

    truncation: float = 0.86
    tokens_per_call: int = 0
    purity_weight: float = 0.0
    purity_temperature: float = 1.0

    def make(self, process: CategoricalProcess) -> CategoricalSampler:
        """The sampler for a process.

        Raises:
            ValueError: A field is out of its range or choices.
        """
        return CategoricalSampler(
            process=process,
            steps=self.steps,
            truncation=self.truncation,
            reveal=self.reveal,
            tokens_per_call=self.tokens_per_call or None,
            purity_weight=self.purity_weight,
            purity_temperature=self.purity_temperature,
        )


@SAMPLINGS.register("masked")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedSampling(RevealSampling):
    """The `sampling` section of masked diffusion; `MaskedSampler` explains the settings.

    Attributes:
        reveal: How tokens are revealed: 'posterior' (ancestral sampling) or 'confidence' (MaskGIT).
        spacing: How the shares of masked tokens decrease over the steps: 'linear' or 'cosine'.
        confidence_temperature: Amount of noise in the order of tokens; only for 'confidence'.
    """

    spacing: str = "cosine"
    confidence_temperature: float = 4.5

    def make(self, process: MaskedProcess) -> MaskedSampler:
        """The sampler for a process.

        Raises:
            ValueError: A field is out of its range or choices.
        """
        return MaskedSampler(
            process=process,
            steps=self.steps,
            truncation=self.truncation,
            reveal=self.reveal,
            spacing=self.spacing,
            confidence_temperature=self.confidence_temperature,
        )
