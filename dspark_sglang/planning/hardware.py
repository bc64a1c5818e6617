"""Machines a plan can be made for: packaged profiles, a file of the user's, the machine at hand."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Literal

import msgspec

from dspark_sglang.errors import ConfigError

MIB = 1 << 20
Architecture = Literal["sm90", "sm100", "cpu"]
_NAME = re.compile(r"(?:(?P<nodes>\d+)x)?(?P<gpu>[a-z]+\d+(?:-\d+)?)x(?P<count>\d+)")
#: Names without their memory.
_ALIASES = {"h100": "h100-80", "h800": "h800-80", "h20": "h20-96", "h200": "h200-141", "b200": "b200-180"}  # fmt: skip
_FIX = "Write NODESxGPUxCOUNT such as h100-80x8 or 2xh100-80x8, or pass a YAML file (see --show-hardware)."


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device as its driver reports it."""

    gpu: str
    #: MiB in all, as ``nvidia-smi`` reports them.
    memory_mib: int
    #: MiB taken before weights load.
    runtime_mib: int
    architecture: Architecture


class Hardware(Gpu, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The machines a server runs on: ``nodes`` times ``gpus`` equal devices."""

    gpus: int
    nodes: int = 1
    name: str = ""

    @property
    def ranks(self) -> int:
        """Devices in all."""
        return self.gpus * self.nodes

    @property
    def on_cpu(self) -> bool:
        """Whether the device is the processor."""
        return self.architecture == "cpu"

    @property
    def usable(self) -> int:
        """Bytes of one device that are free before weights load."""
        return (self.memory_mib - self.runtime_mib) * MIB


def profiles() -> dict[str, Gpu]:
    """The packaged profiles by name."""
    text = resources.files(__package__).joinpath("hardware.yaml").read_bytes()
    return msgspec.yaml.decode(text, type=dict[str, Gpu])


def read(value: str) -> Hardware:
    """A profile's name (``h100-80x8``, ``2xh100-80x8``) or the path of a YAML file.

    Raises:
        ConfigError: an unknown name, an unreadable file, or a value that no machine has.
    """
    path = Path(value).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return _checked(_decode(path), str(path))
    known = profiles()
    match = _NAME.fullmatch(value.lower())
    name = match["gpu"] if match else value
    name = _ALIASES.get(name, name)
    if match is None or name not in known:
        raise ConfigError(
            f"--hardware is {value!r}.",
            expected=f"one of {', '.join(known)} with a count",
            fix=_FIX,
        )
    machine = Hardware(
        **msgspec.structs.asdict(known[name]),
        gpus=int(match["count"]),
        nodes=int(match["nodes"] or 1),
        name=value.lower(),
    )
    return _checked(machine, value)


def _decode(path: Path) -> Hardware:
    try:
        machine = msgspec.yaml.decode(path.read_bytes(), type=Hardware)
    except OSError as error:
        raise ConfigError(
            f"The hardware file {path} cannot be read: {error.strerror}.",
            expected="a YAML file",
            fix=_FIX,
        ) from error
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(
            f"The hardware file {path} is wrong: {error}.",
            expected=", ".join(Hardware.__struct_fields__),
            fix="Start from the output of `dspark plan --show-hardware h100-80x8`.",
        ) from error
    if machine.name:
        return machine
    return msgspec.structs.replace(machine, name=path.stem)


def _checked(machine: Hardware, source: str) -> Hardware:
    ranges = {
        "memory_mib": (8 << 10, 4 << 20),
        "runtime_mib": (0, machine.memory_mib // 4),
        "gpus": (1, 128),
        "nodes": (1, 128),
    }
    for field, (low, high) in ranges.items():
        value = getattr(machine, field)
        if not low <= value <= high:
            raise ConfigError(
                f"{field} in {source} is {value}.", expected=f"{low} to {high}", fix=_FIX
            )
    return machine


def show(machine: Hardware) -> str:
    """``machine`` as a YAML file that :func:`read` accepts."""
    return msgspec.yaml.encode(machine).decode()


def at_hand() -> Hardware:
    """This machine: its CUDA devices, or its processor's memory where there are none."""
    import psutil
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        free, _ = torch.cuda.mem_get_info(0)
        taken = max(device.total_memory - free, 1536 * MIB)
        return Hardware(
            gpu=device.name,
            memory_mib=device.total_memory // MIB,
            runtime_mib=min(taken, device.total_memory // 4) // MIB,
            architecture="sm100" if device.major >= 10 else "sm90",
            gpus=torch.cuda.device_count(),
            name="this machine",
        )
    memory = psutil.virtual_memory()
    return Hardware(
        gpu="CPU",
        memory_mib=memory.available // MIB,
        runtime_mib=0,
        architecture="cpu",
        gpus=1,
        name="this machine",
    )
