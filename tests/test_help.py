"""What ``help()``, ``dir()`` and an editor show of the public modules: what is public, all of it and nothing else."""

import ast
import dataclasses
import importlib
import inspect
import json
import pydoc
import re
import typing
from pathlib import Path
from types import ModuleType

import flax.linen as nn
import pytest
from flax import nnx

import jbn
import jbn.nnx

ROOT = Path(__file__).parents[1]
MODULES = [
    "jbn", "jbn.linen", "jbn.nnx", "jbn.typing",
    "jbn.studies", "jbn.studies.intervals", "jbn.studies.networks", "jbn.studies.noise", "jbn.studies.training",
    "jbn.lab", "jbn.lab.data", "jbn.lab.diagnosis", "jbn.lab.errors", "jbn.lab.models",
]  # fmt: skip
each = pytest.mark.parametrize("name", MODULES)


def public(module: ModuleType) -> dict[str, object]:
    return {name: getattr(module, name) for name in module.__all__}


def is_ours(found: object) -> bool:
    return inspect.isclass(found) and found.__module__.partition(".")[0] == "jbn"


def classes_in(hint: object) -> set[type]:
    """Return the classes of jbn that an annotation names, at any depth."""
    inner = set().union(*map(classes_in, typing.get_args(hint) or (hint if isinstance(hint, list) else ())))
    return inner | ({hint} if is_ours(hint) else set())


def hints(found: object) -> list[object]:
    """Return what a function returns, or of a class the fields, the properties and what methods return."""
    if not inspect.isclass(found):
        return [typing.get_type_hints(found).get("return")]
    inside = [value.fget if isinstance(value, property) else value for value in vars(found).values()]
    functions = [value for value in inside if inspect.isfunction(value) and not value.__name__.startswith("_")]
    fields = [hint for name, hint in typing.get_type_hints(found).items() if not name.startswith("_")]
    return fields + [hint for function in functions for hint in hints(function)]


def types() -> list[type]:
    """Return every public class, and every class of jbn that one can get from those and from public functions."""
    found: set[type] = {type(study) for study in importlib.import_module("jbn.studies").STUDIES.values()}
    ask = [value for name in MODULES for value in public(importlib.import_module(name)).values()]
    while ask:
        value = ask.pop()
        if inspect.isfunction(value) or is_ours(value):
            found |= {value} if is_ours(value) else set()
            ask += set().union(*map(classes_in, hints(inspect.unwrap(value)))) - found
    return sorted(found, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}")


TYPES = types()
of_each = pytest.mark.parametrize("kind", TYPES, ids=lambda kind: f"{kind.__module__}.{kind.__qualname__}")


def attributes(kind: type) -> set[str]:
    """Return the names of the public attributes of an instance that no property documents."""
    if kind is jbn.nnx.BatchNorm:
        names = {*vars(kind(3, rngs=nnx.Rngs(0)))} | {"frozen", "count"}
    elif hasattr(kind, "_fields"):
        names = {*kind._fields}
    elif dataclasses.is_dataclass(kind):
        names = {field.name for field in dataclasses.fields(kind)} - (
            {"parent", "name"} if issubclass(kind, nn.Module) else set()
        )
    else:
        names = {name for base in kind.__mro__ if is_ours(base) for name in vars(base).get("__annotations__", {})}
        names |= set(re.findall(r"self\.(\w+)(?:, self\.\w+)* = ", inspect.getsource(kind)))
    return {name for name in names if not name.startswith("_")}


def documented(kind: type) -> dict[str, str]:
    """Return what the docstring of a class says of each attribute, under ``Attributes:``."""
    section = re.search(
        r"^Attributes:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(kind.__doc__ or ""), re.MULTILINE | re.DOTALL
    )
    entries = re.split(r"^    (?=\w+: )", section[1], flags=re.MULTILINE)[1:] if section else []
    return {name: " ".join(text.split()) for name, _, text in (entry.partition(": ") for entry in entries)}


@each
def test_dir_is_what_is_public(name):
    module = importlib.import_module(name)
    modules = {other.rpartition(".")[2] for other in MODULES if other.rpartition(".")[0] == name}
    assert {*module.__all__} <= {*dir(module)} <= {*module.__all__} | modules
    assert all(hasattr(module, attribute) for attribute in dir(module))


@each
def test_a_module_says_what_is_in_it(name):
    module = importlib.import_module(name)
    inside = [*module.__all__, *(other for other in MODULES if other.rpartition(".")[0] == name)]
    assert [one for one in inside if not re.search(rf"``(jbn\.)?([a-z]+\.)?{one}\b", module.__doc__)] == []


@each
def test_help_shows_the_public_names_and_no_others(name):
    module = importlib.import_module(name)
    text = pydoc.plain(pydoc.render_doc(module))
    shown = re.findall(r"^    class (\w+)|^    (\w+)(?:\(| = )", text[text.index("DESCRIPTION") :], re.MULTILINE)
    assert {a or b for a, b in shown} - {"__version__"} <= {*module.__all__}
    for one, value in public(module).items():
        if not one.startswith("__"):
            assert re.search(rf"^ +(class )?{one}\b|^    {getattr(value, '__name__', one)}\b", text, re.MULTILINE), one


@each
def test_what_is_public_is_documented(name):
    for one, value in public(importlib.import_module(name)).items():
        if inspect.isfunction(value) or inspect.isclass(value):
            assert len(inspect.getdoc(value) or "") > 30, one


@of_each
def test_every_attribute_is_documented(kind):
    inherited = {
        name: text for base in reversed(kind.__mro__) if is_ours(base) for name, text in documented(base).items()
    }
    assert attributes(kind) - {*inherited} == set()
    assert {*documented(kind)} - attributes(kind) == set()
    assert all(len(text) > 3 for text in inherited.values())
    for name, value in vars(kind).items():
        if isinstance(value, property) or (inspect.isfunction(value) and not name.startswith("_")):
            assert value.__doc__, name


@pytest.mark.parametrize("name", ["jbn", "jbn.linen", "jbn.nnx"])
def test_every_argument_says_what_it_may_be(name):
    for one, value in public(importlib.import_module(name)).items():
        functions = [value] if inspect.isfunction(value) else [value.__init__, value.__call__] if is_ours(value) else []
        for function in functions:
            if not inspect.isfunction(function):
                continue
            theirs = inspect.signature(nnx.BatchNorm.__init__).parameters if value is jbn.nnx.BatchNorm else {}
            for parameter in inspect.signature(function).parameters.values():
                more = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
                said = str(parameter.annotation).replace("Callable[..., Any]", "").replace("Mapping[Any, ", "")
                assert more or parameter.name in theirs or not re.search(r"\bAny\b", said), (one, parameter)


def test_help_names_a_kind_of_argument_and_does_not_spell_it_out():
    text = pydoc.plain(pydoc.render_doc(jbn)).replace("'", "")  # newer Pythons leave them out, and break lines
    (signature,) = re.findall(r"^    bn_forward\((.*?)\) -> tuple", text, re.MULTILINE | re.DOTALL)
    assert "params: ParamsLike" in signature
    assert "momentum: Momentum" in signature
    assert "Union[" not in signature
    assert "class Any(" not in pydoc.plain(pydoc.render_doc(importlib.import_module("jbn.typing")))


def sources() -> list[str]:
    """Return what people copy: the code of the texts and of the lessons."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))]
    blocks = [block for text in texts for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        blocks += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return blocks


def test_what_people_copy_imports_what_is_public():
    found = set()
    for block in sources():
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                found |= {(alias.name, "") for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {(node.module, alias.name) for alias in node.names}
    ours = {(module, name) for module, name in found if module.partition(".")[0] == "jbn"}
    assert ours
    for module, name in ours:
        assert module in MODULES, module
        assert not name or name in importlib.import_module(module).__all__, (module, name)
