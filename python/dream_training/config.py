"""The configuration of a training run: a YAML file, any key of which the command line can set."""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dream_kernels.parsing import parse_yaml, read_text, shortened
from dream_training.choices import NO_READER
from dream_training.config_group import Group, flat_name
from dream_training.config_groups import (
    DataConfig,
    DistributionConfig,
    EvaluationConfig,
    HeadsConfig,
    LengthsConfig,
    ObjectiveConfig,
    OptimisationConfig,
    OutputConfig,
    PoolsConfig,
    ReaderConfig,
    RetrieverConfig,
    RunConfig,
)


@dataclass(frozen=True, init=False)
class TrainConfig:
    """Everything that decides a training run, in groups of keys.

    A config is made from keys in groups, from the keys alone by their flat names, or from both::

        TrainConfig(reader={"model": "smollm2", "context": "joint"}, data={"train_data": "t.jsonl"})
        TrainConfig(reader="smollm2", context="joint", train_data="t.jsonl")

    Groups are attributes: ``config.optimisation.batch_size``. A flat name is one too,
    ``config.batch_size``, unless a group has this name. :meth:`flat` gives all keys by flat names.

    Raises:
        ValueError: a key is unknown, missing, or given twice, or a value does not fit.
    """

    reader: ReaderConfig = field(init=False)
    heads: HeadsConfig = field(init=False)
    retriever: RetrieverConfig = field(init=False)
    lengths: LengthsConfig = field(init=False)
    data: DataConfig = field(init=False)
    objective: ObjectiveConfig = field(init=False)
    pools: PoolsConfig = field(init=False)
    optimisation: OptimisationConfig = field(init=False)
    evaluation: EvaluationConfig = field(init=False)
    distribution: DistributionConfig = field(init=False)
    output: OutputConfig = field(init=False)
    run: RunConfig = field(init=False)

    def __init__(self, **keys: Any) -> None:
        values = _completed(flatten(keys, "TrainConfig"))
        check_complete(values, "TrainConfig")
        for group, kind in _GROUPS.items():
            own = {key: values[flat] for key, flat in _KEYS[group].items() if flat in values}
            object.__setattr__(self, group, kind(**own))
        if self.data.streaming and self.objective.name == "infonce":
            raise ValueError("objective 'infonce' needs all lines at once: set streaming: false")
        engine = "fsdp" if self.distribution.fsdp else "deepspeed"
        if self.optimisation.trained_share < 1 and (
            self.distribution.fsdp or self.distribution.deepspeed is not None
        ):
            raise ValueError(
                f"trained_share must be 1 with {engine}, which shards the weights that would be "
                f"averaged, got {self.optimisation.trained_share}"
            )
        if self.data.taught is not None:
            self._check_taught()
        elif self.needs_reader and self.reader.model == NO_READER:
            raise ValueError(
                f"reader must name a language model unless taught is given, got {NO_READER!r}"
            )

    @property
    def needs_reader(self) -> bool:
        """Whether the run reads: not to learn from labels, nor from verdicts of ``dream teach``."""
        return self.objective.name != "infonce" and self.data.taught is None

    def _check_taught(self) -> None:
        """Raise ``ValueError`` if other keys do not go with ``taught``."""
        wanted = self.objective
        if wanted.name != "dream" or wanted.teaching != "distilled":
            got = wanted.name if wanted.name != "dream" else f"teaching {wanted.teaching!r}"
            raise ValueError(
                "taught needs objective 'dream' with teaching 'distilled', whose verdicts it "
                f"holds, got {got}"
            )
        if self.pools.gather_across_devices:
            raise ValueError(
                "gather_across_devices must be false with taught: a query has the pool that it "
                "was taught with"
            )

    def flat(self) -> dict[str, Any]:
        """All keys and values by flat names, as files of a run hold them."""
        return {flat: getattr(getattr(self, group), key) for flat, (group, key) in _PLACES.items()}

    def with_changes(self, **changes: Any) -> TrainConfig:
        """A config with other values of some keys, flat or in groups."""
        return TrainConfig(**{**self.flat(), **flatten(changes, "with_changes")})

    if not TYPE_CHECKING:  # a module of this package takes a key from its group

        def __getattr__(self, name: str) -> Any:
            group, key = _PLACES.get(name, ("", ""))
            if group not in vars(self):
                raise AttributeError(f"TrainConfig has no attribute {name!r}")
            return getattr(vars(self)[group], key)


_GROUPS: dict[str, type[Group]] = typing.get_type_hints(TrainConfig)
# By group, the flat name of each key; and by flat name, the group and the key.
_KEYS = {
    group: {own.name: flat_name(own) for own in dataclasses.fields(kind)}
    for group, kind in _GROUPS.items()
}
_PLACES = {flat: (group, key) for group, keys in _KEYS.items() for key, flat in keys.items()}
_REQUIRED = tuple(
    flat_name(own)
    for kind in _GROUPS.values()
    for own in dataclasses.fields(kind)
    if own.default is dataclasses.MISSING
)


def flatten(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return keys and values by flat names.

    Args:
        values: keys by flat names, ``{"context": "joint"}``; in groups, ``{"reader": {"context":
            "joint"}}``; or with the group before a dot, ``{"reader.context": "joint"}``.
        source: what errors begin with.

    Raises:
        ValueError: a key is unknown (the nearest one is suggested), or given in two forms.
    """
    found: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for written, value in _spelled_out(values, source):
        flat = _flat_name_of(written, source)
        if flat in found:
            raise ValueError(
                f"{source}: {flat} is given twice, as {spelled[flat]} and as {written}: keep one"
            )
        found[flat], spelled[flat] = value, written
    return found


def _spelled_out(values: Mapping[str, Any], source: str) -> Iterator[tuple[str, Any]]:
    """Yield keys and values, the keys of a group with the group before a dot."""
    for key, value in values.items():
        if key in _GROUPS and isinstance(value, Group):
            value = {own.name: getattr(value, own.name) for own in dataclasses.fields(value)}
        if key in _GROUPS and isinstance(value, Mapping):
            yield from ((f"{key}.{own}", inner) for own, inner in value.items())
        elif key in _GROUPS and key not in _PLACES:
            keys = ", ".join(_KEYS[key])
            raise ValueError(f"{source}: {key} must map {keys} to values, got {shortened(value)}")
        else:
            yield key, value


def _flat_name_of(key: object, source: str) -> str:
    """The flat name of a key that is written flat or with its group.

    Raises:
        ValueError: there is no such key.
    """
    if isinstance(key, str) and key in _PLACES:
        return key
    group, dot, own = str(key).partition(".")
    grouped = _KEYS[group] if dot and group in _KEYS else {}
    if own in grouped:
        return grouped[own]
    if grouped:
        # By either name; or in another group.
        names = {**{flat: name for name, flat in grouped.items()}, **{n: n for n in grouped}}
        near = difflib.get_close_matches(own, names, n=1, cutoff=0.5)
        suggested = f"{group}.{names[near[0]]}" if near else None
        if own in _PLACES and own not in names:
            suggested = ".".join(_PLACES[own])
    else:
        near = difflib.get_close_matches(str(key), [*_PLACES, *_GROUPS], n=1, cutoff=0.5)
        suggested = near[0] if near else None
    hint = f"; did you mean {suggested!r}?" if suggested else ""
    raise ValueError(f"{source}: unknown key {shortened(key)}{hint}")


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a run with ``taught`` may leave out; keys are flat."""
    if values.get("taught") is None:
        return values
    return {"reader": NO_READER, "train_data": values["taught"], **values}


def check_complete(values: Mapping[str, Any], source: str) -> None:
    """Raise ``ValueError`` if a key without a default is missing; keys are flat."""
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise ValueError(f"{source}: missing key {', '.join(missing)}")


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML config; ``overrides`` are ``key=value`` and win.

    In the file and in the overrides keys are flat or in groups, see :func:`flatten`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is unknown (the nearest one is suggested), given twice, or missing, or a
            value does not fit.
    """
    return make_config(read_yaml(path), overrides, str(path))


def make_config(values: Mapping[str, Any], overrides: Sequence[str], source: str) -> TrainConfig:
    """Build the config from the values of a file, whose name is ``source``, and overrides."""
    own = _completed({**flatten(values, source), **parse_overrides(overrides)})
    check_complete(own, source)
    return TrainConfig(**own)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or holds something else.
    """
    values = parse_yaml(read_text(path), str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold keys and values, got {type(values).__name__}")
    return values


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn ``key=value`` texts into config values by flat names; a value is read as YAML."""
    values = {}
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"an override must be written key=value, got {shortened(override)}")
        key = key.lstrip("-").replace("-", "_")
        if key not in _GROUPS:
            _flat_name_of(key, "command line")
        values[key] = parse_yaml(value, f"command line: {key}")
    return flatten(values, "command line")
