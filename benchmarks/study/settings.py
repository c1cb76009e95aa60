"""Named ways to train, which are put together with `+`."""

from collections.abc import Sequence

from conprediff_jax.common.errors import UserError
from study.grid import BASELINE, Setting

SETTINGS = {
    BASELINE: Setting(weight=0.0),
    "default": Setting(),
    # Strides.
    "stride_1": Setting(values={"strides": (1,)}),
    "stride_2": Setting(values={"strides": (2,)}),
    "stride_3": Setting(values={"strides": (3,)}),
    "strides_123": Setting(values={"strides": (1, 2, 3)}),
    # Transports.
    "sinkhorn": Setting(values={"transport": "sinkhorn"}),
    "exact": Setting(values={"transport": "exact"}),
    "divergence": Setting(values={"transport": "sinkhorn_divergence"}),
    "gaussian": Setting(values={"transport": "gaussian"}),
    # The decoder, and what it reads.
    "direct": Setting(values={"decoder": "direct"}),
    "features": Setting(values={"source": "features"}),
    "prediction": Setting(values={"source": "prediction"}),
    # Weights relative to the config's, how they rise over the run, and how they vary over time t.
    "weight_tenth": Setting(weight=0.1),
    "weight_third": Setting(weight=1 / 3),
    "weight_triple": Setting(weight=3.0),
    "weight_tenfold": Setting(weight=10.0),
    "no_warmup": Setting(warmup=0.0),
    "warmup_half": Setting(warmup=0.5),
    "warmup_whole": Setting(warmup=1.0),
    "constant": Setting(values={"time_weighting": "constant"}),
    "signal": Setting(values={"time_weighting": "signal"}),
    "snr": Setting(values={"time_weighting": "snr"}),
    # Points and samples of a neighbourhood.
    "every_point": Setting(values={"points_per_example": 0}),
    "q_4": Setting(values={"samples": 4}),
    "q_16": Setting(values={"samples": 16}),
    "q_32": Setting(values={"samples": 32}),
    # The head.
    "deep": Setting(values={"depth": 4}),
    "wide": Setting(values={"hidden": 512}),
    "window": Setting(values={"kernel": 3}),
    # The distance and its targets.
    "smooth_l1": Setting(values={"cost": "smooth_l1"}),
    "difference": Setting(values={"target": "difference"}),
    "normalised": Setting(values={"target": "normalised"}),
    "draws_3": Setting(values={"draws": 3}),
    "masked_border": Setting(values={"border": "masked"}),
    # When the term acts.
    "stop_half": Setting(values={"stop_step": 0.5}),
    "fall_off": Setting(values={"stop_step": 0.0, "fall_off": 1.0}),
    "noise": Setting(values={"time_weighting": "noise"}),
    "bell": Setting(values={"time_weighting": "bell"}),
    "cosine": Setting(values={"cosine_every": 10}),
    # baseline+longer takes about as long as a setting whose steps are slower by a quarter.
    "longer": Setting(longer=1.25),
    # Rivals in the place of context prediction. Their weights are guesses, and no study has looked
    # for better ones yet; join weight_third or weight_triple to vary them.
    "own_point": Setting("own_point", {"weight": 0.09, "cost": "squared"}),
    "layer_alignment": Setting("layer_alignment", {"weight": 0.1}),
    "dispersion": Setting("dispersion", {"weight": 0.1}),
    "masked_input": Setting("masked_input", {"weight": 0.5}),
}

HELP = (
    f"Settings: {', '.join(SETTINGS)}; also taps of the model, such as block_2. Any of these can "
    "be joined by +."
)


def named(name: str, taps: Sequence[str]) -> Setting:
    """The setting of a name, whose parts are joined by +.

    Args:
        name: Parts of `SETTINGS`, or taps.
        taps: Names of the features that the model can return.

    Raises:
        UserError: A part is not known, or two of them set the same key.
    """
    found = Setting()
    for part in name.split("+"):
        if part in taps:
            setting = Setting(values={"tap": part})
        elif part in SETTINGS:
            setting = SETTINGS[part]
        else:
            raise UserError(
                f"--settings={name}: {part!r} is not known; choose of {', '.join(SETTINGS)}, or of "
                f"the taps {', '.join(taps)}"
            )
        try:
            found += setting
        except ValueError as error:
            raise UserError(f"--settings={name}: {error}") from error
    return found
