"""Injection of the operator into transformers models, and reading with a prefix."""

from dream_kernels.injection.context import Prefix
from dream_kernels.injection.inject import Injection, inject_attention
from dream_kernels.injection.reading import read_independently, read_jointly
from dream_kernels.injection.windows import WindowError

__all__ = [
    "Injection",
    "Prefix",
    "WindowError",
    "inject_attention",
    "read_independently",
    "read_jointly",
]
