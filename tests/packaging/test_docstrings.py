"""Every public thing says what it takes and raises, and every cross link in its docstring leads to something: what the
API reference (`make docs`) is made of. STYLE: first line, Args, Raises."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import subnets

import subnet_kernels


def _public(module: ModuleType) -> dict[str, Any]:
    """Full name -> function or class: those of ``__all__``, and of modules named there."""
    names = getattr(module, "__all__", None)
    if names is None:  # a module without __all__: the functions and classes made in it
        made_here = [(n, o) for n, o in vars(module).items() if getattr(o, "__module__", "") == module.__name__]
        names = [name for name, made in made_here if not name.startswith("_") and callable(made)]
    found = {}
    for name in names:
        thing = getattr(module, name)
        found.update(_public(thing) if isinstance(thing, ModuleType) else {f"{module.__name__}.{name}": thing})
    return found


_MAKEFILE = (Path(__file__).resolve().parents[2] / "Makefile").read_text()
MODULES = re.findall(r"^API := (.*)$", _MAKEFILE, flags=re.MULTILINE)[0].split()  # what `make docs` documents
PUBLIC = {name: thing for module in MODULES for name, thing in _public(importlib.import_module(module)).items()}
_LISTS = ("Args", "Attributes")
each = pytest.mark.parametrize("name", PUBLIC)


def _members(cls: type) -> dict[str, Any]:
    """Public methods and properties that the class itself defines, as functions."""
    unwrapped = {
        name: getattr(member, "__func__", getattr(member, "fget", member)) for name, member in vars(cls).items()
    }
    return {name: member for name, member in unwrapped.items() if inspect.isfunction(member) and name[0] != "_"}


def _section(doc: str, *titles: str) -> str:
    """The lines of these sections, ``Args:`` and what is indented under it."""
    pattern = rf"^(?:{'|'.join(titles)}):\n((?:[ ]+.*\n|\n)*)"
    return "\n".join(match[1] for match in re.finditer(pattern, doc + "\n", re.MULTILINE))


def _named_in(text: str, parameters: list[str]) -> set[str]:
    """The parameters that the text names; "first ... last" names all between them too."""
    named = {name for name in parameters if re.search(rf"\b{name}\b", text)}
    for first, last in re.findall(r"(\w+) \.\.\. (\w+)", text):
        if first in parameters and last in parameters:
            named.update(parameters[parameters.index(first) : parameters.index(last) + 1])
    return named


def _raises_itself(function: Any) -> bool:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))


def _entry(thing: Any) -> Any:
    """The function that a call of ``thing`` runs first."""
    if not inspect.isclass(thing):
        return inspect.unwrap(thing)
    if dataclasses.is_dataclass(thing):
        return vars(thing).get("__post_init__")
    return vars(thing).get("__init__")


def test_the_public_names_are_as_many_as_both_packages_promise():
    assert {"subnets.mask_model", "subnets.objectives.kl_to_unmasked", "subnet_kernels.optim.MaskAdamW"} <= set(PUBLIC)
    for package in (subnets, subnet_kernels):
        assert package.__doc__ and len(package.__all__) == len(set(package.__all__))


@each
def test_its_docstring_names_every_argument_and_says_what_is_raised(name):
    thing = PUBLIC[name]
    doc = inspect.cleandoc(thing.__doc__ or "")
    assert doc.splitlines() and len(doc.splitlines()[0]) > 10, f"{name} has no docstring"
    is_made_by_others = inspect.isclass(thing) and "Attributes:" in doc and "Args:" not in doc
    entry = _entry(thing)
    if entry is None:
        return
    if not is_made_by_others:
        parameters = [p for p in inspect.signature(entry).parameters if p != "self"]
        if dataclasses.is_dataclass(thing):
            parameters = [field.name for field in dataclasses.fields(thing) if field.init]
        missing = set(parameters) - _named_in(_section(doc, *_LISTS), parameters)
        assert not missing, f"{name}: the section Args: of its docstring misses {sorted(missing)}"
    if _raises_itself(entry):
        assert _section(doc, "Raises").strip(), f"{name} raises, and its docstring has no section Raises:"


@each
def test_its_methods_have_docstrings(name):
    if inspect.isclass(PUBLIC[name]):
        missing = [n for n in _members(PUBLIC[name]) if not inspect.getdoc(getattr(PUBLIC[name], n))]
        assert not missing, f"{name}: no docstring for {missing}"


def _documented(thing: Any) -> list[str]:
    """The docstrings of a function, or of a class and its methods."""
    members = _members(thing).values() if inspect.isclass(thing) else ()
    return [documented.__doc__ or "" for documented in (thing, *members)]


@each
def test_its_docstrings_read_as_markdown_too(name):
    for doc in _documented(PUBLIC[name]):
        text = re.sub(r"``[^`]*``|`[^`]*`|>>>.*", "", doc)
        tags = re.findall(r"<[A-Za-z/][^>\s]*>", text)
        assert not tags, f"{name}: {tags} would vanish as HTML tags; put them in backquotes"
        assert not re.search(r"^ *====", doc, flags=re.MULTILINE), f"{name}: write its table with | as Markdown does"


def _resolves(target: str, scopes: list[Any]) -> bool:
    """Does the dotted name exist, from the root of Python or in one of the classes and modules?"""
    try:
        pkgutil.resolve_name(target)
        return True
    except (ImportError, AttributeError, ValueError):
        return any(_has(scope, target.split(".")) for scope in scopes)


def _has(scope: Any, parts: list[str]) -> bool:
    for part in parts:
        if not hasattr(scope, part):  # then an instance's attribute, which the class's docstring names
            return inspect.isclass(scope) and bool(_named_in(_section(inspect.getdoc(scope) or "", *_LISTS), [part]))
        scope = getattr(scope, part)
    return True


@each
def test_cross_links_in_its_docstrings_lead_to_something(name):
    thing = PUBLIC[name]
    scopes = [thing, importlib.import_module(thing.__module__), subnets, subnet_kernels]
    for doc in _documented(thing):
        roles = re.findall(r":(?:class|func|meth|mod|attr):`~?([^`]+)`", doc)
        plain = [t for t in re.findall(r"(?<![`:])`([A-Za-z_][\w.]*)`(?!`)", doc) if "." in t]
        broken = [target for target in (*roles, *plain) if not _resolves(target, scopes)]
        assert not broken, f"{name}: links to {broken}, which do not exist"
