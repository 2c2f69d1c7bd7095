"""``dream`` with FSDP or DeepSpeed on CPUs, for which accelerate has no engine but DDP.

The environment variable ``PRETEND`` names the distributed type that accelerate is to assume.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from dream_training.cli import main

original = PartialState.__init__


def pretend(self: PartialState, *args: Any, **options: Any) -> None:
    """Start as on CPUs, then report the type that accelerate requires to run the engine."""
    original(self, *args, **options)
    if self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType(os.environ["PRETEND"])


if __name__ == "__main__":
    PartialState.__init__ = pretend  # type: ignore[method-assign]
    main()
