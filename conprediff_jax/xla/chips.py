"""What accelerators can do at best, by the names that JAX gives them.

The TPU figures are from Google's Cloud TPU documentation (cloud.google.com/tpu/docs/v4, /v5e,
/v5p-training, /v6e): peak bf16 FLOP/s, HBM and its bandwidth, and the bandwidth of the inter-chip
interconnect (ICI). The pages add up both directions of the ICI; the figures here are for one
direction. The page of v4 does not state its bandwidth: six links of 50 GB/s agree with the 24 TB/s
that it gives across the middle of a 16 x 16 x 16 pod.

The GPU figures are the dense bf16 FLOP/s of one GPU in NVIDIA's data sheets, which is half of what
the sheets state with sparsity. Only the log of a run uses them.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One TPU chip.

    Attributes:
        flops: Peak bf16 FLOP/s.
        hbm_bytes: Bytes of HBM.
        hbm_bandwidth: Bytes/s between HBM and the cores.
        ici_bandwidth: Bytes/s that a chip can send to its neighbours over all its links at once.
        dimensions: Dimensions of the torus that a slice forms.
        cores: TensorCores of a chip. Cloud's names of v4 and v5p slices count cores, not chips.
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

# Values of `jax.Device.device_kind`, and the keys of `CHIPS` that they stand for.
_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
# FLOP/s by the first words of `jax.Device.device_kind`; its other words name memory and socket.
# Slower cards with the same chip have entries of their own.
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
    """Peak bf16 FLOP/s of a device; None for a device that is not in the lists, such as a CPU.

    Args:
        device_kind: The device's `jax.Device.device_kind`.
    """
    if device_kind in _TPU_KINDS:
        return CHIPS[_TPU_KINDS[device_kind]].flops
    # Names match by whole words, since an L40 is no L4. The longest match counts: an H100 NVL is
    # slower than an H100.
    words = device_kind.replace("-", " ") + " "
    matching = [name for name in _GPU_FLOPS if words.startswith(name + " ")]
    return _GPU_FLOPS[max(matching, key=len)] if matching else None
