"""The public functions of the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dream_kernels import autograd, library
from dream_kernels.argument_checks import is_traced
from dream_kernels.dispatch import Explanation, explain_problem, select
from dream_kernels.problem import Reading
from dream_kernels.validation import build_problem


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    spans: Tensor,
    *,
    mode: str = "reweight",
    heads: Sequence[int] | Tensor | None = None,
    document_mass: float | None = None,
    scale: float | None = None,
    causal: bool = True,
    attention_mask: Tensor | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    window: int | None = None,
    positions: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Attention in which per-document scores decide how much each document is read.

    A row is *scored* in a head when the head receives the scores, at least one document is
    present, and every present document ends at or before the row's own position. All other rows
    attend plainly. For a scored row, with :math:`a_j` the usual logits,

    - ``mode="reweight"`` (the DREAM paper, arXiv 2606.24667):
      :math:`o = \mu \sum_d w_d o_d + (1 - \mu) o_\mathrm{rest}`, where :math:`o_d` is attention
      normalised inside document :math:`d`, :math:`w = \mathrm{softmax}(\mathrm{scores})` over the
      present documents, and :math:`\mu` the share of attention that the documents get together;
    - ``mode="bias"``: ``scores[d]`` is added to the logits of the keys of document :math:`d`.

    The result is differentiable once in ``query``, ``key``, ``value``, ``scores``, ``prefix`` and
    ``sinks``;
    only the gradients that are asked for are computed. Sums are accumulated in float32 (float64
    for float64 inputs).

    Args:
        query: ``[B, Hq, M, D]``, float16, bfloat16, float32 or float64.
        key: ``[B, Hkv, N, D]`` in the dtype of ``query``; ``Hkv`` divides ``Hq`` (grouped-query
            attention).
        value: ``[B, Hkv, N, Dv]``, otherwise as ``key``.
        scores: ``[B, C]`` or ``[B, Hq, C]``, any float dtype: one logit per candidate document,
            similarity over temperature. ``-inf`` gives weight 0; an absent document's score is
            ignored and gets gradient 0.
        spans: ``[B, C, 2]`` int32 or int64: half-open ranges of key positions, counted from the
            start of ``prefix`` and then ``key``. ``start == end``, or a range of padding only,
            marks an absent document. Documents are disjoint, in any order.
        mode: ``"reweight"`` or ``"bias"``.
        heads: the query heads that receive the scores, as integers or as bool ``[Hq]``; None for
            all, an empty sequence for plain attention.
        document_mass: ``"reweight"`` only: fixes :math:`\mu`, in (0, 1]. None keeps the mass that
            the reader's own attention gives to the documents. Where nothing outside the documents
            is visible :math:`\mu` is 1.
        scale: factor of the logits, ``D ** -0.5`` by default.
        causal: row ``m`` sees keys ``0 .. (P + N - M) + m``.
        attention_mask: ``[B, P + N]`` bool or integer, 1 for a token and 0 for padding, on either
            side.
        prefix: ``(key, value)`` of ``[1 or B, Hkv, P, D]`` and ``[1 or B, Hkv, P, Dv]``, which
            precede ``key`` and ``value``. Batch 1 is shared by all ``B`` rows; it is read in place.
        window: a row sees only keys less than ``window`` positions before its own, as in sliding
            window attention. A scored row always sees its documents in full, and the window holds
            for the other keys: it must be long enough. Needs ``causal``.
        positions: ``[B, P + N]`` int32 or int64: the position of every key, from which ``window``
            counts; by default the keys count up. Row ``m`` is at the position of key
            ``P + N - M + m``. Causality does not depend on it.
        softcap: :math:`c > 0` in :math:`c \tanh(a_j / c)`, which replaces the logit :math:`a_j`
            before anything else is added.
        sinks: ``[Hq]``, any float dtype: for each head a logit without a value in the normaliser of
            every row, part of what is outside the documents, whose mass is then never 0.
            Differentiable.
        impl: ``"auto"``, ``"triton"``, ``"cuda"``, ``"cpu"`` or ``"reference"``. A named
            implementation runs or raises; see :func:`explain`.

    Returns:
        ``[B, Hq, M, Dv]`` in the dtype of ``query`` (the autocast dtype under autocast). A row that
        sees no key is 0.

    Raises:
        TypeError: an argument has the wrong type, dtype or layout.
        ValueError: an argument has the wrong shape, device or content, or ``impl`` is unknown.
        NotImplementedError: ``impl`` names an implementation that cannot run this call, or a
            transform of ``torch.func`` or ``torch.jit.trace`` is at work.
    """
    return attend(
        None,
        impl,
        query,
        key,
        value,
        scores,
        spans,
        mode=mode,
        heads=heads,
        document_mass=document_mass,
        scale=scale,
        causal=causal,
        attention_mask=attention_mask,
        prefix=prefix,
        window=window,
        positions=positions,
        softcap=softcap,
        sinks=sinks,
    )


def attend(
    reading: Reading | None,
    impl: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    spans: Tensor,
    *,
    prefix: tuple[Tensor, Tensor] | None,
    **options: Any,
) -> Tensor:
    """:func:`document_attention` as one of the calls of a reading, all options given."""
    query, key, value, prefix = autocast_inputs(query, key, value, prefix)
    problem = build_problem(
        query, key, value, scores, spans, prefix=prefix, reading=reading, **options
    )
    return autograd.run(problem, select(problem, impl))


def document_mass(
    query: Tensor,
    key: Tensor,
    spans: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    attention_mask: Tensor | None = None,
    prefix: tuple[Tensor, Tensor] | Tensor | None = None,
    window: int | None = None,
    positions: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return how much plain attention each row gives to each document.

    For analysis and head selection; no attention matrix is built and no gradient recorded.

    Args:
        query: ``[B, Hq, M, D]``.
        key: ``[B, Hkv, N, D]``.
        spans: ``[B, C, 2]``, as in :func:`document_attention`.
        scale: as in :func:`document_attention`.
        causal: as in :func:`document_attention`.
        attention_mask: as in :func:`document_attention`.
        prefix: as in :func:`document_attention`, or its keys alone.
        window: as in :func:`document_attention`; here it holds for documents too.
        positions: as in :func:`document_attention`.
        softcap: as in :func:`document_attention`.
        sinks: as in :func:`document_attention`.
        impl: as in :func:`document_attention`.

    Returns:
        ``[B, Hq, M, C]`` float32 (float64 for float64 inputs): the sum of the attention
        probabilities over the keys of the document that the row sees; 0 for absent documents.

    Raises:
        TypeError: an argument has the wrong type, dtype or layout.
        ValueError: an argument has the wrong shape, device or content, or ``impl`` is unknown.
        NotImplementedError: ``impl`` names an implementation that cannot run this call, or a
            transform of ``torch.func`` or ``torch.jit.trace`` is at work.
    """
    return mass_of_documents(
        None,
        impl,
        query,
        key,
        spans,
        scale=scale,
        causal=causal,
        attention_mask=attention_mask,
        prefix=prefix,
        window=window,
        positions=positions,
        softcap=softcap,
        sinks=sinks,
    )


def mass_of_documents(
    reading: Reading | None,
    impl: str,
    query: Tensor,
    key: Tensor,
    spans: Tensor,
    *,
    prefix: tuple[Tensor, Tensor] | Tensor | None,
    **options: Any,
) -> Tensor:
    """:func:`document_mass` as one of the calls of a reading, all options given."""
    pair = (prefix, prefix) if isinstance(prefix, Tensor) else prefix
    query, key, _, pair = autocast_inputs(query, key, key, pair)
    # The mass is that of plain attention: no head receives the scores, so zeros will do.
    documents = spans.shape[1] if isinstance(spans, Tensor) and spans.dim() == 3 else 1
    problem = build_problem(
        query,
        key,
        key,
        torch.zeros(len(query), documents, device=query.device),
        spans,
        mode="reweight",
        heads=(),
        document_mass=None,
        prefix=pair,
        reading=reading,
        **options,
    )
    implementation = select(problem, impl)
    if problem.empty:
        shape = (*problem.query.shape[:3], problem.documents)
        return query.new_zeros(shape, dtype=problem.accumulate_dtype)
    if is_traced(problem.query):
        return library.document_mass(problem, implementation.name)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        return implementation.mass(problem)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    spans: Tensor,
    *,
    mode: str = "reweight",
    heads: Sequence[int] | Tensor | None = None,
    document_mass: float | None = None,
    scale: float | None = None,
    causal: bool = True,
    attention_mask: Tensor | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    window: int | None = None,
    positions: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> Explanation:
    """Say which implementation :func:`document_attention` would take for this call, and why.

    Takes the same arguments and raises the same errors, but runs nothing. ``print`` the result to
    see every implementation with its reason.
    """
    query, key, value, prefix = autocast_inputs(query, key, value, prefix)
    problem = build_problem(
        query,
        key,
        value,
        scores,
        spans,
        mode=mode,
        heads=heads,
        document_mass=document_mass,
        scale=scale,
        causal=causal,
        attention_mask=attention_mask,
        prefix=prefix,
        window=window,
        positions=positions,
        softcap=softcap,
        sinks=sinks,
    )
    return explain_problem(problem, impl)


def autocast_inputs(
    query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Cast to the autocast dtype, as PyTorch does for its own attention."""
    device = query.device.type if isinstance(query, Tensor) else "meta"
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return query, key, value, prefix
    dtype = torch.get_autocast_dtype(device)
    if prefix is not None:
        prefix = (prefix[0].to(dtype), prefix[1].to(dtype))
    return query.to(dtype), key.to(dtype), value.to(dtype), prefix
