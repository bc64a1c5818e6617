"""Numbers between host and device, without a wait for either."""

from __future__ import annotations

import torch


def to_device(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Values of the host on a device. A GPU reads them from pinned memory, while the host goes on."""
    if torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def to_host(values: torch.Tensor) -> torch.Tensor:
    """Values on the host, once the device has come so far: to be read after an event that follows."""
    if values.device.type == "cpu":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
