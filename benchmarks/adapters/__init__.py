"""One file per peer: how it computes a case, or why it cannot."""

from __future__ import annotations

from .base import Adapter, Prepared, Refusal
from .eager import Eager
from .extra_channel import ExtraChannel
from .flash import FlashAttention
from .flex import FlexAttention
from .ours import Ours
from .sdpa import SdpaMask, SdpaUnbiased
from .xformers import Xformers

# The first one that can run a case is the baseline of the others.
ADAPTERS: dict[str, Adapter] = {
    adapter.name: adapter
    for adapter in (
        Ours("cuda"),
        Ours("triton"),
        Ours("cpu"),
        Ours("reference"),
        Eager(),
        SdpaUnbiased("expanded"),
        SdpaUnbiased("grouped"),
        SdpaUnbiased("joined"),
        SdpaMask(),
        ExtraChannel(),
        FlexAttention(),
        Xformers(),
        FlashAttention(),
    )
}

__all__ = ["ADAPTERS", "Adapter", "Prepared", "Refusal"]
