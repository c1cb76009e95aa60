"""What an accelerator can do at best, by the name that JAX gives it.

TPU figures are those of Google's Cloud TPU documentation (cloud.google.com/tpu/docs/v4, /v5e,
/v5p-training, /v6e): peak bf16 FLOP/s, HBM and its bandwidth, and the bandwidth of the inter-chip
interconnect (ICI), which the pages give for both directions and which is one way here. The page of
v4 does not state the last: six links of 50 GB/s agree with its 24 TB/s across the middle of a
16 x 16 x 16 pod.

GPU figures are dense bf16 FLOP/s a GPU of NVIDIA's data sheets, half of what these give with
sparsity; they serve the log of a run only.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One TPU chip.

    Attributes:
        flops: peak bf16 FLOP/s.
        hbm_bytes: memory.
        hbm_bandwidth: bytes/s between it and the cores.
        ici_bandwidth: bytes/s that a chip can send to its neighbours, over all its links at once.
        dimensions: of the torus.
        cores: TensorCores a chip; Cloud's names of v4 and v5p slices count them, not chips.
    """

    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    dimensions: int
    cores: int


CHIPS: dict[str, Chip] = {
    "v4": Chip(
        flops=275e12,
        hbm_bytes=32 * GIB,
        hbm_bandwidth=1200e9,
        ici_bandwidth=300e9,
        dimensions=3,
        cores=2,
    ),
    "v5e": Chip(
        flops=197e12,
        hbm_bytes=16 * GIB,
        hbm_bandwidth=819e9,
        ici_bandwidth=200e9,
        dimensions=2,
        cores=1,
    ),
    "v5p": Chip(
        flops=459e12,
        hbm_bytes=95 * GIB,
        hbm_bandwidth=2765e9,
        ici_bandwidth=600e9,
        dimensions=3,
        cores=2,
    ),
    "v6e": Chip(
        flops=918e12,
        hbm_bytes=32 * GIB,
        hbm_bandwidth=1640e9,
        ici_bandwidth=400e9,
        dimensions=2,
        cores=1,
    ),
}

# `jax.Device.device_kind` of a chip, or of what begins so.
_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
# The first words of `jax.Device.device_kind`; the rest says memory and socket. Slower cards of the
# same chip have entries of their own.
_GPU_FLOPS = {
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200": 990e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bf16 FLOP/s of a device; None where it is not known, as for CPUs.

    Args:
        device_kind: `jax.Device.device_kind`.
    """
    if device_kind in _TPU_KINDS:
        return CHIPS[_TPU_KINDS[device_kind]].flops
    # Whole words, as an L40 is no L4, and the longest name, as an H100 NVL is not any H100.
    words = device_kind.replace("-", " ") + " "
    matching = [name for name in _GPU_FLOPS if words.startswith(name + " ")]
    return _GPU_FLOPS[max(matching, key=len)] if matching else None
