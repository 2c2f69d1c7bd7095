"""``dream`` with FSDP or DeepSpeed on CPUs, for which accelerate has no engine but DDP.

The environment variable ``PRETEND`` names the kind of processes that accelerate is to believe in.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from dream_training.cli import main

original = PartialState.__init__


def pretend(self: PartialState, *args: Any, **options: Any) -> None:
    """Start as on CPUs, then be what accelerate asks for before it lets the engine run."""
    original(self, *args, **options)
    if self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType(os.environ["PRETEND"])


if __name__ == "__main__":
    PartialState.__init__ = pretend  # type: ignore[method-assign]
    main()
