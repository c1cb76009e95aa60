"""The device mesh: `data` (replicas), `fsdp` (replicas that share state), `tensor` (shards)."""

import dataclasses

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # a batch is divided over both


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """Sizes of the mesh axes; `data` = -1 takes whatever devices the others leave.

    Attributes:
        data: replicas with their own part of the batch.
        fsdp: as `data`, but parameters and optimiser state are divided over them (ZeRO-3).
        tensor: devices that divide attention heads and feed-forward layers.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        if self.data != -1 and self.data < 1:
            raise ValueError(f"data is {self.data}: it must be at least 1, or -1 for the rest")
        for name in ("fsdp", "tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")

    def shape(self, devices: int) -> tuple[int, int, int]:
        """Sizes of (data, fsdp, tensor) on so many devices.

        Raises:
            ValueError: the axes do not multiply to the number of devices.
        """
        shared = self.fsdp * self.tensor
        data = devices // shared if self.data == -1 else self.data
        if data * shared != devices:
            raise ValueError(
                f"data {self.data} x fsdp {self.fsdp} x tensor {self.tensor} does not match the "
                f"{devices} devices there are: the product must be {devices}"
            )
        return data, self.fsdp, self.tensor


def make_mesh(spec: MeshSpec, devices: list | None = None) -> Mesh:
    """A mesh over the given devices (default: all of every process), neighbours kept adjacent."""
    devices = jax.devices() if devices is None else devices
    shape = spec.shape(len(devices))
    return Mesh(mesh_utils.create_device_mesh(shape, devices), AXES)
