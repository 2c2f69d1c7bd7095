"""The documented public objects of a package, and what a name in a docstring refers to."""

from __future__ import annotations

import importlib
import inspect
import operator
import pkgutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

# Submodules that are shipped but not public.
_NOT_PUBLIC = frozenset(
    {"tests", "conftest", "setup", "core", "distutils", "f2py", "externals", "typing"}
)
# numpy.linalg, torch.nn.functional: deeper modules only repeat names or are internal.
_SUBMODULE_DEPTH = 2
_ABBREVIATIONS = {"np": "numpy", "nx": "networkx", "sp": "scipy"}


@dataclass(frozen=True)
class PublicObject:
    """A function, class or method with a docstring.

    Attributes:
        name: the shortest public qualified name that is not an alias, such as
            ``numpy.concatenate`` and not ``numpy.concat``.
        docstring: as written, with its indentation removed.
        value: the object itself.
        owner: the class, when the object is a method.
    """

    name: str
    docstring: str
    value: Any = field(repr=False)
    owner: type | None = None


class PublicApi:
    """The documented public objects of some packages, by name and by identity.

    Args:
        packages: import names. A package that cannot be imported is listed in ``missing``.

    Attributes:
        objects: sorted by name; one entry per object and per docstring.
        missing: package and reason for each package that could not be imported.
        skipped_modules: number of public submodules that could not be imported.
    """

    def __init__(self, packages: Iterable[str]) -> None:
        self.missing: dict[str, str] = {}
        self.skipped_modules = 0
        self._packages = set(packages)
        # The objects are kept alive by `objects`, so an id stays valid.
        self._name_of: dict[int, str] = {}
        found: dict[str, PublicObject] = {}
        # Deprecated names warn on access; nothing here calls them.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for package in packages:
                for entry in self._walk(package):
                    found.setdefault(entry.name, entry)
        self.objects = self._without_copies(found.values())

    def resolve(self, name: str, source: PublicObject) -> str | None:
        """Find the object that ``name`` refers to in the docstring of ``source``.

        Tried in turn: a full name, then the class of ``source``, then the module that defines
        ``source`` and the modules of its public name, each with their parents.

        Args:
            name: as written in a See Also section, with or without ``~`` and ``()``.
            source: the object whose docstring mentions the name.

        Returns:
            The name of an entry of ``objects``, or None.
        """
        name = name.strip().lstrip("~.").removesuffix("()")
        first, _, rest = name.partition(".")
        if first in _ABBREVIATIONS and rest:
            first, name = _ABBREVIATIONS[first], f"{_ABBREVIATIONS[first]}.{rest}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if first in self._packages:
                return self._lookup(sys.modules.get(first), rest)
            for scope in _scopes(source):
                known = self._lookup(scope, name)
                if known is not None and known != source.name:
                    return known
        return None

    def _lookup(self, scope: object, dotted: str) -> str | None:
        try:
            value = operator.attrgetter(dotted)(scope)
        except Exception:
            # Lazy modules raise whatever their import raises.
            return None
        return self._name_of.get(id(_unwrap(value)))

    def _walk(self, package: str) -> Iterator[PublicObject]:
        """Yield each object under each of its public names."""
        try:
            root = importlib.import_module(package)
        except ImportError as error:
            self.missing[package] = str(error)
            return
        for module in self._modules(root):
            # Without __all__ a module's imports look like its own names, unless they come from
            # inside it.
            home = package if hasattr(module, "__all__") else module.__name__
            for attribute in _public_names(module):
                value = getattr(module, attribute, None)
                if not _is_defined_in(value, home):
                    continue
                name = f"{module.__name__}.{attribute}"
                docstring = _own_docstring(value)
                if docstring:
                    yield PublicObject(name, docstring, value)
                if inspect.isclass(value):
                    yield from _methods(value, name)

    def _modules(self, root: ModuleType, depth: int = 0) -> Iterator[ModuleType]:
        yield root
        if depth == _SUBMODULE_DEPTH:
            return
        # Found on disk and not among the attributes of `root`, whose set depends on what the
        # process has imported before.
        for info in sorted(pkgutil.iter_modules(getattr(root, "__path__", [])), key=lambda i: i[1]):
            if info.name.startswith("_") or info.name in _NOT_PUBLIC:
                continue
            try:
                module = importlib.import_module(f"{root.__name__}.{info.name}")
            except (Exception, SystemExit):
                # Optional dependencies, other platforms, removed standard modules.
                self.skipped_modules += 1
                continue
            yield from self._modules(module, depth + 1)

    def _without_copies(self, entries: Iterable[PublicObject]) -> list[PublicObject]:
        """Keep one name per object and per docstring: no alias if possible, then the shortest."""
        by_docstring: dict[str, PublicObject] = {}
        by_id: dict[int, PublicObject] = {}
        for entry in sorted(entries, key=_preference):
            identity = id(_unwrap(entry.value))
            if identity not in by_id:
                by_id[identity] = by_docstring.setdefault(entry.docstring, entry)
        self._name_of = {identity: entry.name for identity, entry in by_id.items()}
        return sorted(by_docstring.values(), key=lambda e: e.name)


def _preference(entry: PublicObject) -> tuple[bool, int, int, str]:
    own_name = getattr(entry.value, "__name__", None)
    is_alias = isinstance(own_name, str) and entry.name.rpartition(".")[2] != own_name
    return is_alias, entry.name.count("."), len(entry.name), entry.name


def _scopes(source: PublicObject) -> Iterator[object]:
    if source.owner is not None:
        yield source.owner
    defined_in = getattr(source.owner or source.value, "__module__", None)
    for start in (defined_in, source.name.rpartition(".")[0]):
        module = start if isinstance(start, str) else ""
        while module:
            if module in sys.modules:
                yield sys.modules[module]
            module = module.rpartition(".")[0]


def _public_names(module: ModuleType) -> list[str]:
    names = getattr(module, "__all__", None)
    if names is None:
        names = vars(module)
    return sorted({str(name) for name in names if not str(name).startswith("_")})


def _is_defined_in(value: object, home: str) -> bool:
    if value is None or inspect.ismodule(value) or not callable(value):
        return False
    module = getattr(value, "__module__", None)
    # Functions written in C often name no module.
    return not isinstance(module, str) or f"{module}.".startswith(f"{home}.")


def _methods(owner: type, owner_name: str) -> Iterator[PublicObject]:
    """The methods that a class defines itself, not those it inherits."""
    for attribute in sorted(vars(owner)):
        value = _unwrap(vars(owner)[attribute])
        if attribute.startswith("_") or inspect.isclass(value) or not callable(value):
            continue
        docstring = _own_docstring(value)
        if docstring:
            yield PublicObject(f"{owner_name}.{attribute}", docstring, value, owner)


def _own_docstring(value: object) -> str:
    """The docstring written for this object; an instance's is often that of its class."""
    docstring = getattr(value, "__doc__", None)
    if not isinstance(docstring, str):
        return ""
    inherited = not inspect.isclass(value) and docstring == type(value).__doc__
    return "" if inherited else inspect.cleandoc(docstring)


def _unwrap(value: Any) -> Any:
    """The function behind a class or static method, which is created at each access."""
    return getattr(value, "__func__", value)
