"""Attention with per-document scores, fused, and its injection into transformers models.

The operator is :func:`document_attention`; :func:`inject_attention` puts it into a model.
"""

from dream_kernels.api import document_attention, document_mass, explain
from dream_kernels.dispatch import Explanation
from dream_kernels.head_file import HeadFile, read_heads, write_heads
from dream_kernels.injection import (
    Injection,
    Prefix,
    inject_attention,
    read_independently,
    read_jointly,
)
from dream_kernels.value_checks import set_value_checks
from dream_kernels.version import __version__

__all__ = [
    "Explanation",
    "HeadFile",
    "Injection",
    "Prefix",
    "__version__",
    "document_attention",
    "document_mass",
    "explain",
    "inject_attention",
    "read_heads",
    "read_independently",
    "read_jointly",
    "set_value_checks",
    "write_heads",
]
