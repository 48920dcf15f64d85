"""Devices: the defaults that a device chooses."""

from __future__ import annotations

from dataclasses import dataclass

from lime_edge.errors import LimeEdgeError

CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Device:
    """Defaults for one kind of device.

    threads: intra-op threads, None for the engine's own choice. group: elements per int4 scale.
    providers: ONNX Runtime execution providers in order of preference.
    activations: of ONNX graphs; a GPU's attention kernel takes float16 only.
    """

    name: str
    about: str
    threads: int | None
    group: int
    providers: tuple[str, ...]
    activations: str = "float32"


DEVICES = {
    device.name: device
    for device in (
        Device("cpu", "any x86-64 or arm64 computer", None, 32, (CPU,)),
        Device("raspberry-pi", "Raspberry Pi 4 and 5: four cores, no accelerator", 4, 32, (CPU,)),
        Device(
            "jetson",
            "NVIDIA Jetson, and other NVIDIA GPUs: CUDA, float16 activations",
            None,
            32,
            ("CUDAExecutionProvider", CPU),
            "float16",
        ),
        Device(
            "android",
            "phones: XNNPACK on the big cores",
            4,
            32,
            ("XnnpackExecutionProvider", CPU),
        ),
    )
}


def find_device(name: str) -> Device:
    """The device of that name.

    Raises:
        LimeEdgeError: unknown.
    """
    if name not in DEVICES:
        raise LimeEdgeError(
            f"`device`: expected {', '.join(DEVICES)}, found {name!r}",
            "cpu suits any computer; the device only sets defaults",
        )
    return DEVICES[name]
