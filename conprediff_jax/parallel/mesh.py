"""The device mesh: `data` (replicas), `fsdp` (replicas that share state), `tensor` (shards).

Devices of one TPU slice, or of one GPU host, talk to each other over a fast network (ICI, NVLink),
and to those of others over the data centre's (DCN). On more than one slice the mesh is a hybrid: an
axis is the product of a part over the slow network, outside, and a part over the fast one, inside.
"""

import dataclasses
import math

import jax
import numpy as np
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
        dcn_data: the part of `data` that crosses the slow network; -1: as many slices as go into
            it.
        dcn_fsdp: the part of `fsdp` that does; -1: the slices that `data` leaves. With both at -1
            hosts count as slices only where their devices say so; a number above 1 makes them.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    dcn_data: int = -1
    dcn_fsdp: int = -1

    def __post_init__(self):
        for name in ("data", "dcn_data", "dcn_fsdp"):
            value = getattr(self, name)
            if value != -1 and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1, or -1 for the rest")
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

    def dcn_shape(self, devices: int, slices: int) -> tuple[int, int, int]:
        """The parts of (data, fsdp, tensor) that cross the network between so many slices.

        Raises:
            ValueError: the slices do not go into `data` and `fsdp` as asked for.
        """
        data, fsdp, _ = self.shape(devices)
        dcn_data, dcn_fsdp = self.dcn_data, self.dcn_fsdp
        if dcn_data == -1:
            dcn_data = math.gcd(data, slices if dcn_fsdp == -1 else max(slices // dcn_fsdp, 1))
        if dcn_fsdp == -1:
            dcn_fsdp = max(slices // dcn_data, 1)
        if dcn_data * dcn_fsdp != slices or data % dcn_data or fsdp % dcn_fsdp:
            raise ValueError(
                f"dcn_data {dcn_data} x dcn_fsdp {dcn_fsdp} does not fit {slices} slices, data "
                f"{data} and fsdp {fsdp}: the product must be {slices}, and each must divide its "
                "axis"
            )
        return dcn_data, dcn_fsdp, 1


def make_mesh(spec: MeshSpec, devices: list | None = None) -> Mesh:
    """A mesh over the given devices (default: all of every process), neighbours kept adjacent.

    Raises:
        ValueError: the spec does not fit the devices.
    """
    return Mesh(arrange(spec, jax.devices() if devices is None else devices), AXES)


def arrange(spec: MeshSpec, devices: list) -> np.ndarray:
    """The devices as an array of (data, fsdp, tensor), slices side by side; see `make_mesh`."""
    shape = spec.shape(len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    by_host = slices == 1 and max(spec.dcn_data, spec.dcn_fsdp) > 1
    if by_host:
        slices = len({device.process_index for device in devices})
    outer = spec.dcn_shape(len(devices), slices)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    inner = tuple(size // part for size, part in zip(shape, outer, strict=True))
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=by_host, allow_split_physical_axes=True
    )
