"""Text encoders, which turn token ids into the sequence that cross-attention reads.

All three are transformers with a norm before each branch,

    x + attention(norm(x)),   x + feed_forward(norm(x))                                          (1)

and a norm after the last block. They differ in these points:

    CLIP   learned positions; a token sees itself and those before it; the activation
           x sigmoid(1.702 x)
    BERT   learned positions; all tokens see each other and the padding; GELU; q, k and v have no
           biases
    T5     no positions, but a bias b on the attention for each distance; padding is hidden;
           softmax(q k^T + b) v without a scale; W_out (gelu(W_gate x) * W_in x);                (2)
           root-mean-square norms; no other biases

In T5, a query i and a key j at the distance d = |j - i| have the bias of their bucket, one of n
buckets with the numbers

    (n / 2) [j > i] + min(place(d), n / 2 - 1),       m = n / 4                                  (3)
    place(d) = d                                                       where d < m
               m + floor(m log(d / m) / log(max_distance / m))         elsewhere                 (4)

Parameter paths follow the scheme of the token transformer:

    token_embedding   position_embedding or, in T5, distance_embedding   output_norm
    blocks/{attention,feed_forward}_norm   blocks/attention/{query, key, value, out}
    blocks/feed_forward/{in, gate, out}

Sources: CLIP: Radford et al. 2021 (arXiv 2103.00020). BERT: the transformer that was trained with
latent diffusion's text-to-image model, Rombach et al. 2022 (arXiv 2112.10752), section 4.3.1. T5:
Raffel et al. 2020 (arXiv 1910.10683), version 1.1 with Shazeer's gated GELU (arXiv 2002.05202).
"""

from conprediff_jax.common.registry import Registry
from conprediff_jax.models.text.bert import BERTText
from conprediff_jax.models.text.clip import CLIPText
from conprediff_jax.models.text.encoder import TextEncoder
from conprediff_jax.models.text.t5 import T5Text

TEXT_ENCODERS: Registry[type] = Registry("text encoder")
TEXT_ENCODERS.register("clip")(CLIPText)
TEXT_ENCODERS.register("t5")(T5Text)
TEXT_ENCODERS.register("bert")(BERTText)

__all__ = ["TEXT_ENCODERS", "BERTText", "CLIPText", "T5Text", "TextEncoder"]
