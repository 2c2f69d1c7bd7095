"""Sharding of reader and retriever (FSDP2), and whole copies of a sharded retriever."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dream_kernels.injection.support import backbone_of
from dream_training.distributed import world

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel


class Pace:
    """Keeps the processes' passes through a sharded model in step.

    Each layer's weights are fetched from all processes when it runs, so all of them must run it
    equally often. Before every pass a process announces it; those that have none left run dummy
    passes until all are done.

    Args:
        model: the sharded model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._for_nothing = False
        backbone_of(model).register_forward_pre_hook(self._announce)

    def spare(self, passes: int) -> int:
        """How many more passes the process with the most makes; all processes call it.

        :meth:`catch_up` cannot make up for passes with a backward.
        """
        return world.max_over_ranks(passes) - passes

    @torch.no_grad()
    def catch_up(self) -> None:
        """Run dummy passes while other processes have passes left; all call it at the end."""
        embeddings: Any = self.model.get_input_embeddings()
        ids = torch.zeros(1, 1, dtype=torch.long, device=embeddings.weight.device)
        self._for_nothing = True
        while world.max_over_ranks(0):
            backbone_of(self.model)(input_ids=ids, use_cache=False)
        self._for_nothing = False

    def _announce(self, module: nn.Module, args: Any) -> None:
        if not self._for_nothing:
            world.max_over_ranks(1)


def shard_model(model: PreTrainedModel, device: str | torch.device) -> Pace | None:
    """Shard the layers of a frozen decoder over all processes (FSDP2), in place.

    Embeddings, last norm and head stay whole in each process.

    Args:
        model: a frozen decoder, whole in each process; best on the CPU, since each layer is
            moved to ``device`` and sharded before the next.
        device: where the shards are.

    Returns:
        What keeps the passes in step, or None if there is only one process.

    Raises:
        ValueError: torch is older than 2.7, or the decoder's layers are not where transformers
            puts them.
    """
    if world.size() == 1:
        model.to(device)  # type: ignore[arg-type]
        return None
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ValueError(
            f"reader_sharding 'sharded' needs torch 2.7 or newer, got torch {torch.__version__}"
        )
    decoder: Any = backbone_of(model)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            "reader_sharding 'sharded' needs a decoder with a list of layers, got "
            f"{type(decoder).__name__}"
        )
    mesh = init_device_mesh(torch.device(device).type, (world.size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    whole = {p for p in decoder.parameters() if id(p) not in inside}
    # The rest is moved unsharded; the root only orders the layers.
    for module in (decoder, model):
        for child in module.children():
            if child is not layers and child is not decoder:
                child.to(device)
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    return Pace(model)


def shard_retriever(model: SentenceTransformer, plugin: Any) -> None:
    """Shard a retriever over all processes (FSDP2) by its language model's layers, in place.

    Args:
        model: the retriever, whole and equal in each process.
        plugin: accelerate's settings of FSDP; layers that they name are used instead.

    Raises:
        ValueError: the settings are those of FSDP1.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            "FSDP must have version 2 (fsdp_version), got 1, which cannot keep adapters and frozen "
            "weights in one unit"
        )
    options: dict[str, Any] = {"mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy()}
    if plugin.cpu_offload:
        options["offload_policy"] = plugin.cpu_offload
    names = _layer_classes(model)
    if plugin.transformer_cls_names_to_wrap:
        names, plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap, None
    for module in list(model.modules()):
        if type(module).__name__ in names:
            fully_shard(module, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(model, **options)


def _layer_classes(model: SentenceTransformer) -> set[str]:
    """The classes of the retriever's layers, as its language model names them."""
    named: set[str] = set()
    for module in model.modules():
        named |= set(getattr(module, "_no_split_modules", None) or ())
    return named


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of some parameters (FSDP2, ZeRO-3)."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        map(_is_zero3, model.parameters())
    )


def whole_copy(model: SentenceTransformer) -> SentenceTransformer:
    """Return a copy of a sharded retriever that every process holds whole; all of them call it.

    Tokenizer and settings are shared with the model itself, which is left as it is.
    """
    from sentence_transformers import SentenceTransformer

    copied: dict[int, Any] = {}
    result = SentenceTransformer(
        modules=[_whole_module(module, copied) for module in model],
        device=str(model.device),
        prompts=model.prompts,  # type: ignore[arg-type]
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
    )
    result.model_card_data = model.model_card_data
    return result


def whole(model: SentenceTransformer) -> SentenceTransformer:
    """The retriever itself, or a whole copy of it if it is sharded; all processes call it."""
    return whole_copy(model) if is_sharded(model) else model


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Load models whole in each process, regardless of the engine that will train.

    Launched for FSDP or ZeRO-3, transformers would load the weights only in process 0, or only a
    part of each, and leave the rest to the engine, which does not manage the reader.
    """
    from transformers.integrations import deepspeed

    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(name)
    reference = getattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    engine_config = reference() if reference is not None else None
    os.environ[name] = "false"
    if engine_config is not None:
        deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if engine_config is not None:
            deepspeed.set_hf_deepspeed_config(engine_config)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _whole_module(module: nn.Module, copied: dict[int, Any]) -> nn.Module:
    """Copy a module without an engine's changes to its class, hooks and parameters.

    FSDP2 refuses ``deepcopy``, which would copy shards.
    """
    from torch.distributed.fsdp import FSDPModule

    if id(module) in copied:
        return copied[id(module)]
    kind = type(module)
    if issubclass(kind, FSDPModule):  # made by fully_shard() of (FSDPModule, the module's own)
        kind = kind.__bases__[1]
    result: Any = kind.__new__(kind)
    copied[id(module)] = result
    nn.Module.__init__(result)
    fresh = set(vars(result))
    for name, value in vars(module).items():
        # Engines and accelerate replace a module's forward with their own.
        if name not in fresh and name != "forward":
            # The copy has its own adapter state, such as whether it is merged.
            own = copy.copy(value) if isinstance(value, (dict, list, set)) else value
            object.__setattr__(result, name, own)
    result.training = module.training
    result._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for name, parameter in module._parameters.items():
        result._parameters[name] = (
            None if parameter is None else _whole_parameter(parameter, copied)
        )
    for name, buffer in module._buffers.items():
        result._buffers[name] = None if buffer is None else buffer.detach().clone()
    for name, child in module._modules.items():
        result._modules[name] = None if child is None else _whole_module(child, copied)
    return result


@torch.no_grad()
def _whole_parameter(parameter: nn.Parameter, copied: dict[int, Any]) -> nn.Parameter:
    if id(parameter) not in copied:
        from torch.distributed.tensor import DTensor

        with _gathered(parameter):
            data = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            copied[id(parameter)] = nn.Parameter(
                torch.as_tensor(data).detach().clone(), requires_grad=parameter.requires_grad
            )
    return copied[id(parameter)]


def _is_zero3(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id") and hasattr(parameter, "ds_status")


def _gathered(parameter: Tensor) -> AbstractContextManager[Any]:
    if not _is_zero3(parameter):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])
