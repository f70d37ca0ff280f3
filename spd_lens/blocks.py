"""How much is worked on at a time where a computation goes block by block instead of through main memory."""

from __future__ import annotations

import torch


def block_entries(device: torch.device) -> int:
    """Entries of one block: what a core's cache holds on a CPU; far more elsewhere, where launches cost more than
    traffic."""
    return 2**19 if device.type == "cpu" else 2**26
