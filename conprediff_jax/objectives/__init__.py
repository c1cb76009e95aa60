"""Terms that training adds to the denoising loss: context prediction, and its rivals.

A term reads features from inside the denoiser, the clean points and the diffusion times, and gives
a loss for every example. It may have parameters of its own, which sampling never sees. Any number
of terms can be mixed; each has its own weight and says when it acts (`context.Weighting`).

Start reading at `term.Term`. A further term is one file here, with a line below.
"""

from conprediff_jax.objectives.context import ContextTerm
from conprediff_jax.objectives.dispersion import Dispersion
from conprediff_jax.objectives.encoder_alignment import EncoderAlignment
from conprediff_jax.objectives.layer_alignment import LayerAlignment
from conprediff_jax.objectives.masked_input import MaskedInput
from conprediff_jax.objectives.own_point import OwnPoint
from conprediff_jax.objectives.term import TERMS, Evaluated, Seen, Term

__all__ = [
    "TERMS",
    "ContextTerm",
    "Dispersion",
    "EncoderAlignment",
    "Evaluated",
    "LayerAlignment",
    "MaskedInput",
    "OwnPoint",
    "Seen",
    "Term",
]
