"""Injection of the operator into transformers models, and reading with a prefix."""

from dream_kernels.injection.attention import WindowError
from dream_kernels.injection.context import Prefix
from dream_kernels.injection.inject import Injection, inject_attention
from dream_kernels.injection.reading import read_independently, read_jointly

__all__ = [
    "Injection",
    "Prefix",
    "WindowError",
    "inject_attention",
    "read_independently",
    "read_jointly",
]
