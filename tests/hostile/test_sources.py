"""Calls that no module of the project may make."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path
    for folder in ("dream_kernels", "python", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# These load untrusted models; only trust.py may call them: it refuses pickles and code.
LOADERS = {"AutoTokenizer", "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor"}


def name_of(node: ast.expr) -> str:
    """``a.b.c`` as text."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def faults(source: str) -> list[str]:
    """Return the forbidden imports and calls of a module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"imports {n}" for n in names if n.partition(".")[0] in UNPICKLERS]
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if name == "torch.load" and keywords.get("weights_only") is not True:
            found.append("torch.load without weights_only=True")
        if keywords.get("allow_pickle", False) is not False:
            found.append(f"{name} with allow_pickle")
        if keywords.get("weights_only", True) is not True:
            found.append(f"{name} with weights_only=False")
        if name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
            found.append(name)
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            found.append(name)
        if keywords.get("shell", False) is not False:
            found.append(f"{name} with a shell")
        if name.endswith(("pandas.read_pickle", "pd.read_pickle")):
            found.append(name)
        if name.startswith("jinja2.Template") or name == "Template":
            found.append("a template outside of the sandbox")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import joblib.externals", "torch.load(p)",
        "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "yaml.load(t, L)",
        "eval('1')", "exec(t)", "subprocess.run(t, shell=True)", "pd.read_pickle(p)",
    ],
)  # fmt: skip
def test_the_search_finds(source: str) -> None:
    assert faults(source)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    assert not faults(path.read_text(encoding="utf-8"))


def loads_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {name_of(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {call for call in calls if call.removesuffix(".from_pretrained") in LOADERS} & {
        f"{name}.from_pretrained" for name in LOADERS
    } | ({"SentenceTransformer"} & calls)


def test_models_are_loaded_in_one_place() -> None:
    """Or from GGUF files, which hold no code, or from modules that were loaded there."""
    elsewhere = {
        "trust.py": {"SentenceTransformer"} | {f"{n}.from_pretrained" for n in LOADERS},
        "models/gguf_files.py": {
            f"{n}.from_pretrained" for n in ("AutoModelForCausalLM", "AutoTokenizer")
        },
        "models/retriever.py": {"SentenceTransformer", "AutoConfig.from_pretrained"},
        "distributed/sharding.py": {"SentenceTransformer"},
    }
    package = ROOT / "python" / "dream_training"
    for path in package.rglob("*.py"):
        allowed = elsewhere.get(str(path.relative_to(package)), set())
        assert loads_of(path) <= allowed, path
