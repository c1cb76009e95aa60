"""The device mesh: `data` (replicas), `fsdp` (replicas that share state), `tensor` (shards).

The devices of one TPU slice, or of one GPU host, are connected by a fast network (ICI, NVLink).
Slices and hosts are connected by the network of the data centre (DCN). On more than one slice the
mesh is a hybrid: an axis is the product of an outer part, which crosses the slow network, and an
inner part, which stays on the fast one.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # both of them divide a batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """Sizes of the mesh axes.

    Attributes:
        data: Number of replicas that each read their own part of the batch; -1 for all devices
            that the other axes leave.
        fsdp: Number of replicas that, besides, divide parameters and optimiser state among
            themselves (ZeRO-3).
        tensor: Number of devices that divide attention heads and feed-forward layers.
        dcn_data: The factor of `data` that crosses the slow network; -1 for as many slices as
            divide it.
        dcn_fsdp: The factor of `fsdp` that crosses the slow network; -1 for the slices that `data`
            leaves. If `dcn_data` or `dcn_fsdp` is above 1 and all devices are in one slice, every
            host counts as a slice.
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
        """Sizes of (data, fsdp, tensor) on a number of devices.

        Raises:
            ValueError: The product of the axes is not the number of devices.
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
        """The factors of (data, fsdp, tensor) that cross the network between the slices.

        Raises:
            ValueError: `data` and `fsdp` cannot be divided over the slices as specified.
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
    """Makes a mesh in which devices that are neighbours in the network stay neighbours.

    Args:
        spec: Sizes of the axes.
        devices: The devices; by default all devices of all processes.

    Raises:
        ValueError: The spec does not fit the devices.
    """
    return Mesh(arrange(spec, jax.devices() if devices is None else devices), AXES)


def arrange(spec: MeshSpec, devices: list) -> np.ndarray:
    """Devices as an array by (data, fsdp, tensor), slice by slice; see `make_mesh`."""
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
