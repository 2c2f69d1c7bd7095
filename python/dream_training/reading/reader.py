"""The reader: a frozen language model that predicts targets from scored documents."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dream_kernels import (
    HeadFile,
    Prefix,
    inject_attention,
    read_independently,
    read_jointly,
)
from dream_training.choices import (
    CONTEXTS,
    INJECTED_ROWS,
    PLAIN,
    check_at_least,
    check_choice,
    check_document_store,
)
from dream_training.distributed.sharding import Pace, shard_model
from dream_training.models.gguf_files import unpacked
from dream_training.models.text_tokens import check_vocabulary
from dream_training.reading.document_store import open_document_store
from dream_training.reading.prompts import ReaderPrompt, load_reader_prompt
from dream_training.reading.quantization import check_gradient, load_frozen, prepare_quantised
from dream_training.reading.target_loss import (
    at_least_float32,
    loss_of_scores,
    plain_head,
    target_losses,
)
from dream_training.reading.tokens import PromptTokens, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens of queries and targets that run at once, by default: enough for full speed.
_ROWS_PER_PASS = {"cpu": 256, "accelerator": 8192}


@dataclass(frozen=True)
class Reading:
    """What :meth:`Reader.forward` returns.

    Attributes:
        loss: scalar, mean next-token loss over the target tokens of the batch, in nats.
        query_losses: ``[B]``, the mean over each query's own target tokens, detached.
        target_tokens: number of target tokens in the batch.
    """

    loss: Tensor
    query_losses: Tensor
    target_tokens: int


class Reader(nn.Module):
    """A frozen decoder in which document scores act on some attention heads.

    Args:
        model: a transformers decoder; it is frozen and set to eval mode.
        tokenizer: its tokenizer.
        heads: the heads that receive the scores: ``{layer: [head, ...]}``, a head file or its path.
        top_k: how many of the best heads of a head file; None for those that it says were chosen.
        context: ``"independent"``: each document is read alone, at the same positions; or
            ``"joint"``: the documents are read as one sequence.
        mode: as in :func:`dream_kernels.document_attention`.
        document_mass: as in :func:`dream_kernels.document_attention`.
        injected_rows: the rows that the scores act on: ``"all"`` after the documents; or
            ``"target"``, those that predict a target's tokens, the query being read plainly.
        query_max_len: tokens of a query that are read; longer ones are cut.
        passage_max_len: tokens of a document that are read.
        target_max_len: tokens of a target that are predicted.
        prompt: the text around documents, query and target: a :class:`ReaderPrompt`, ``"plain"``,
            ``"chat"``, or the path of a Jinja template, see
            :func:`~dream_training.reading.prompts.load_reader_prompt`.
        impl: as in :func:`dream_kernels.document_attention`.
        rows_per_pass: tokens of queries and targets that run at once, at least one query; None
            for what keeps the device busy. It bounds memory and changes no result.
        document_store: where documents that were read stay, so that they are not read again:
            ``"memory"``, a folder, or None for nowhere. Independent reading only.
        document_store_gb: what the store keeps at most, in 10⁹ bytes; the documents used least
            recently go first.

    Attributes:
        tokens: the :class:`~dream_training.reading.tokens.PromptTokens` of its prompt and lengths.
        store: the :class:`~dream_training.reading.document_store.DocumentStore`, or None.

    Raises:
        ValueError: an argument is out of range, the model cannot be injected, or the tokenizer has
            tokens that its embedding lacks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        heads: Mapping[int, Sequence[int]] | HeadFile | str | os.PathLike[str],
        *,
        top_k: int | None = None,
        context: str = "independent",
        mode: str = "reweight",
        document_mass: float | None = None,
        injected_rows: str = "all",
        query_max_len: int = 32,
        passage_max_len: int = 128,
        target_max_len: int = 32,
        prompt: ReaderPrompt | str | os.PathLike[str] = PLAIN,
        impl: str = "auto",
        rows_per_pass: int | None = None,
        document_store: str | os.PathLike[str] | None = None,
        document_store_gb: float = 2.0,
    ) -> None:
        super().__init__()
        check_choice("context", context, CONTEXTS)
        check_choice("injected_rows", injected_rows, INJECTED_ROWS)
        check_document_store(document_store, document_store_gb, context)
        check_at_least("rows_per_pass", rows_per_pass, 1)
        check_vocabulary(tokenizer, model, "reader")
        self.model = model.requires_grad_(False).eval()
        self._unchecked = prepare_quantised(self, self.model)
        self.tokenizer = tokenizer
        self.context = context
        self.injected_rows = injected_rows
        self.rows_per_pass = rows_per_pass
        if not isinstance(prompt, ReaderPrompt):
            prompt = load_reader_prompt(prompt, tokenizer)
        self.tokens = PromptTokens(
            tokenizer, prompt, query_max_len, passage_max_len, target_max_len
        )
        self.injection = inject_attention(
            self.model, heads, top_k=top_k, mode=mode, document_mass=document_mass, impl=impl
        )
        # A state would pass over padding before a token.
        self._padding = "right" if self.injection.keeps_states else "left"
        self.store = open_document_store(document_store, self.model, document_store_gb)
        self._head = plain_head(self.model)
        self._pace: Pace | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        heads: Mapping[int, Sequence[int]] | HeadFile | str | os.PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        quantization: str | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Reader:
        """Load model and tokenizer; ``heads`` and ``options`` as in the constructor.

        Args:
            path: folder, GGUF file or hub name.
            dtype: of the weights; ``"auto"`` as stored.
            device: where to put the model; None for the CPU.
            trust_remote_code: run code that comes with the model.
            quantization: of the weights, as
                :func:`~dream_training.reading.quantization.quantization_config` takes it, or None.

        Raises:
            ModuleNotFoundError: a package that reads or quantises the model is missing.
            ValueError: the model brings code that is not allowed, has pickled weights, or cannot be
                quantised so; or as in the constructor.
        """
        from dream_training.trust import load_tokenizer

        path = unpacked(path, dtype, "reader")
        tokenizer = load_tokenizer(path, trust_remote_code, "reader")
        model = load_frozen(path, quantization, dtype, device, trust_remote_code)
        return cls(model, tokenizer, heads, **options)

    def train(self, mode: bool = True) -> Reader:
        """Do nothing: the reader stays frozen and in eval mode inside a training loop."""
        return self

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def loss_dtype(self) -> torch.dtype:
        """Of losses and likelihoods: float32, or that of the weights if it is wider."""
        return torch.promote_types(self.model.get_input_embeddings().weight.dtype, torch.float32)

    @property
    def sharded(self) -> bool:
        """Whether its layers are cut over all processes, which then read together."""
        return self._pace is not None

    def shard(self, device: str | torch.device) -> Reader:
        """Cut the layers over all processes, see ``shard_model``; the results stay the same.

        From then on all processes read together: each calls :meth:`read` and :meth:`forward` as
        often as the others, whatever it has to read.

        Args:
            device: where this process's part lives.

        Raises:
            ValueError: the model cannot be sharded; the message says why.
        """
        self._pace = shard_model(self.model, device)
        return self

    def catch_up(self) -> None:
        """Wait for the other processes of a sharded reader; nothing elsewhere."""
        if self._pace is not None:
            self._pace.catch_up()

    def read(
        self, documents: Sequence[str], pools: Sequence[Sequence[int]] | None = None
    ) -> Prefix:
        """Read the documents once, without gradient.

        Args:
            documents: texts, at least one, none blank or without a token.
            pools: for each query the indices of its documents; None for one pool of all
                documents that every query shares.

        Raises:
            ValueError: there is no document, or a blank one.
        """
        tokens = self.tokens.documents(documents)
        if not tokens:
            raise ValueError("documents must hold at least one text, got none")
        if self.context == "independent":
            prefix = read_independently(
                self.model, tokens, pools, header=self.tokens.header, store=self.store
            )
            self.catch_up()
            return prefix
        rows = [range(len(tokens))] if pools is None else pools
        sequences, spans = [], torch.zeros(len(rows), max(map(len, rows)), 2, dtype=torch.long)
        for b, pool in enumerate(rows):
            sequence = list(self.tokens.header)
            for c, i in enumerate(pool):
                spans[b, c, 0] = len(sequence)
                sequence += tokens[i]
                spans[b, c, 1] = len(sequence)
            sequences.append(sequence)
        ids, mask = pad(sequences, "right", self.device)
        prefix = read_jointly(self.model, ids, spans.to(self.device), mask)
        self.catch_up()
        return prefix

    def forward(
        self, prefix: Prefix, queries: Sequence[str] | None, targets: Sequence[str], scores: Tensor
    ) -> Reading:
        """Predict every target from its query and the scored documents.

        Args:
            prefix: the documents, from :meth:`read`; one pool, or one for each query.
            queries: ``B`` texts, none blank; None for the prompt's own text around a query alone,
                which also takes the place of a query that is its own target.
            targets: ``B`` texts, none blank.
            scores: ``[B, C]`` logits over the documents, any device; gradients flow into them. Or
                ``[B, Hq, C]`` or ``[B, layers, Hq, C]``, where heads differ.

        Raises:
            ValueError: a target is blank, or does not fit into the reader's context; or a quantised
                layer lets no gradient through.
        """
        if queries is None:
            query_ids = [self.tokens.no_query] * len(targets)
        else:
            query_ids = self.tokens.queries_of(queries, targets)
        target_ids = self.tokens.targets(targets)
        self.check_context(prefix, query_ids, target_ids)
        if self._unchecked and scores.requires_grad:
            check_gradient(self.model)
            self._unchecked = False
        passes = self.passes(query_ids, target_ids)
        losses, query_losses = loss_of_scores(
            scores, lambda own: self._run_passes(prefix, query_ids, target_ids, own, passes)
        )
        return Reading(losses, query_losses, sum(map(len, target_ids)))

    def passes(self, query_ids: list[list[int]], target_ids: list[list[int]]) -> list[list[int]]:
        """Which queries run at once: neighbours in the batch, up to ``rows_per_pass`` tokens."""
        limit = self.rows_per_pass
        if limit is None:
            limit = _ROWS_PER_PASS["cpu" if self.device.type == "cpu" else "accelerator"]
        lengths = [len(q) + len(t) for q, t in zip(query_ids, target_ids)]
        passes: list[list[int]] = [[]]
        longest = 0
        for b, length in enumerate(lengths):
            longest = max(longest, length)
            if passes[-1] and longest * (len(passes[-1]) + 1) > limit:
                passes.append([])
                longest = length
            passes[-1].append(b)
        return passes

    def _run_passes(
        self,
        prefix: Prefix,
        query_ids: list[list[int]],
        target_ids: list[list[int]],
        scores: Tensor,
        passes: list[list[int]],
    ) -> tuple[Tensor, Tensor]:
        """Return loss and losses by query, with the gradient of the loss left in ``scores``."""
        count = sum(map(len, target_ids))
        options: Any = {"device": self.device, "dtype": self.loss_dtype}
        total = torch.zeros((), **options)
        by_query = []
        spare = 0 if self._pace is None else self._pace.spare(len(passes))
        # Passes that a sharded reader runs because other processes have more to read do not count.
        for index, rows in enumerate([*passes, *[passes[-1]] * spare]):
            losses = self.token_losses(
                prefix.of_rows(torch.tensor(rows, device=self.device)),
                [query_ids[b] for b in rows],
                [target_ids[b] for b in rows],
                scores[rows[0] : rows[-1] + 1],
            )
            counted = index < len(passes)
            own = losses.sum() / count if counted else losses.sum() * 0.0
            if own.requires_grad:
                own.backward()
            if not counted:
                continue
            total += own.detach()
            counts = torch.tensor([len(target_ids[b]) for b in rows], device=self.device)
            query = torch.repeat_interleave(counts, output_size=len(losses))
            sums = torch.zeros(len(rows), **options)
            by_query.append(sums.index_add_(0, query, losses.detach()) / counts)
        return total, torch.cat(by_query)

    def token_losses(
        self,
        prefix: Prefix,
        query_ids: list[list[int]],
        target_ids: list[list[int]],
        scores: Tensor | None,
    ) -> Tensor:
        """Return the loss of every target token, query after query; plain reading if no scores."""
        first_row = None
        if self.injected_rows == "all":
            pairs = [q + t for q, t in zip(query_ids, target_ids)]
            ids, mask = pad(pairs, self._padding, self.device)
            begins = [len(query) for query in query_ids]
            if self._padding == "left":
                begins = [ids.shape[1] - len(target) for target in target_ids]
        else:
            # Targets begin in one column, so that the rows before it are those of the queries.
            left = pad(query_ids, "left", self.device)
            right = pad(target_ids, "right", self.device)
            ids, mask = (torch.cat(parts, dim=1) for parts in zip(left, right))
            begins = [left[0].shape[1]] * len(ids)
            first_row = begins[0] - 1
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "document_prefix": prefix,
            "document_scores": scores,
            "document_first_row": first_row,
            "use_cache": False,
        }
        # The row before a token predicts it. Positions without a target get no logits: over a
        # whole vocabulary those would cost more than all the rest.
        flat = [
            b * ids.shape[1] + place
            for b, (begin, target) in enumerate(zip(begins, target_ids))
            for place in range(begin, begin + len(target))
        ]
        of_token = torch.tensor(flat, device=ids.device)
        targets = ids.flatten()[of_token]
        if self._head is not None:
            states = self.injection.decode(**inputs).flatten(0, 1)[of_token - 1]
            return target_losses(self._head, states, targets)
        logits = self.model(**inputs).logits.flatten(0, 1)[of_token - 1]
        return nn.functional.cross_entropy(at_least_float32(logits), targets, reduction="none")

    def query_rows(self, queries: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokenise queries alone, for head selection.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[B, M]``, padded, and ``row_weights`` ``[B, M]``
            that average over the tokens of the query text.
        """
        pieces = self.tokens.queries_and_spans(queries)
        ids, mask = pad([tokens for tokens, _ in pieces], self._padding, self.device)
        weights = torch.zeros(ids.shape, device=self.device)
        for b, (tokens, (start, end)) in enumerate(pieces):
            offset = ids.shape[1] - len(tokens) if self._padding == "left" else 0
            weights[b, offset + start : offset + end] = 1.0 / (end - start)
        return ids, mask, weights

    def suffix_rows(
        self, queries: Sequence[str], targets: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokenise queries with their targets, as :meth:`forward` reads them.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[B, M]``, padded, and ``row_weights`` ``[B, M]``
            that average over all tokens of a row.
        """
        pairs = zip(self.tokens.queries_of(queries, targets), self.tokens.targets(targets))
        ids, mask = pad([query + target for query, target in pairs], self._padding, self.device)
        return ids, mask, mask / mask.sum(1, keepdim=True)

    def check_context(
        self, prefix: Prefix, query_ids: list[list[int]], target_ids: list[list[int]]
    ) -> None:
        """Raise ``ValueError`` if a target does not fit after its documents and query."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is None:
            return
        start = int(prefix.next_position.max())
        for i, (query, target) in enumerate(zip(query_ids, target_ids)):
            needed = start + len(query) + len(target)
            if needed > limit:
                raise ValueError(
                    f"target {i} does not fit into the reader's context of {limit} tokens: "
                    f"documents {start}, query {len(query)}, target {len(target)}"
                )
