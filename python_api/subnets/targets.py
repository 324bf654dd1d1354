"""Which parameters of a model to mask, and how: ``targets`` and ``exclude`` of mask_model."""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from .nn import MaskedConv2d, MaskedHFConv1D, MaskedLayer, MaskedLinear
from .nn.hf_conv1d import is_hf_conv1d

Pattern = str | type[nn.Module]
Targets = Pattern | Sequence[Pattern]
Options = Mapping[str, Any]
TargetsWithOptions = Targets | Mapping[Pattern, Options]

OPTIONS = ("kind", "unit", "score_init", "fused")  # of mask_model, that a mapping of targets may set by pattern
_GROUPS: dict[str, tuple[type[nn.Module], ...]] = {
    "all-linear": (nn.Linear, nn.Bilinear, nn.MultiheadAttention),
    "all-conv": (_ConvNd,),
    "all-embedding": (nn.Embedding, nn.EmbeddingBag),
}
_BY_DEFAULT = (nn.Linear, nn.MultiheadAttention, _ConvNd)
_MASKABLE = tuple(kind for kinds in _GROUPS.values() for kind in kinds)
_MHA_INPUTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_QUESTIONS = ("dtype", "device", "shape", "size", "dim", "ndim", "requires_grad")  # of a weight, not for its values
_SETUP = ("__init__", "_init_", "init_", "reset_", "tie_", "_tie_")  # what runs before training


class Target(NamedTuple):
    """One parameter to mask.

    Attributes:
        module, parameter: where it is.
        cls: the masked twin that ``module`` becomes; None where the mask goes over reads of the parameter.
        sharers: other modules that hold the same (tied) parameter, with its names there.
        options: of the pattern that it matched.
    """

    module: nn.Module
    parameter: str
    cls: type[MaskedLayer] | None
    sharers: tuple[tuple[nn.Module, str], ...]
    options: Options


def masked_class(module: nn.Module) -> type[MaskedLayer] | None:
    """The masked twin of an ordinary layer, or None if there is none. Exact types only: a subclass may compute
    something else."""
    if type(module) is nn.Linear:
        return MaskedLinear
    if type(module) is nn.Conv2d:
        return MaskedConv2d
    if is_hf_conv1d(module):
        return MaskedHFConv1D
    return None


def find_targets(
    model: nn.Module, targets: TargetsWithOptions | None, exclude: Targets = (), fused: bool = True
) -> dict[str, Target]:
    """Parameter name -> what mask_model masks, in the model's order.

    Raises:
        ValueError: nothing matches (the message lists what could), a pattern matches nothing, a named module has
            nothing to mask, or two parameters lie in the same memory.
        TypeError: targets or exclude are of another form.
    """
    _check_form("exclude", exclude)
    model_map = _Map(model)
    chosen: dict[_Key, Options] = {}
    if isinstance(targets, Mapping):
        chosen = _by_patterns(model_map, targets)
    else:
        _check_form("targets", targets)
        chosen = {key: {} for key in model_map.chosen(targets, "targets")}
    excluded = set(model_map.chosen(exclude, "exclude")) if _is_given(exclude) else set()
    if isinstance(exclude, str) and not excluded:
        raise ValueError(f"mask_model: exclude={exclude!r} matches no whole module name; mend it or leave it out")
    found = {}
    for key in sorted(set(chosen) - excluded, key=model_map.order.__getitem__):
        first, *others = model_map.places(key)
        module_name, parameter = first
        if out := [_full(*place) for place in (first, *others) if place in excluded]:
            raise ValueError(
                f"mask_model: {_full(*key)} is tied to {', '.join(out)}, which exclude names; exclude both or neither"
            )
        module, options = model_map.modules[module_name], chosen[key]
        cls = masked_class(module) if parameter == "weight" else None
        if others or not options.get("fused", fused) or model_map.is_read(module_name, module):
            cls = None
        sharers = tuple((model_map.modules[name], own) for name, own in others)
        found.setdefault(_full(*first), Target(module, parameter, cls, sharers, options))
    if not found:
        raise ValueError(
            f"mask_model: targets={targets!r} with exclude={exclude!r} match nothing; {model_map.possible()}"
        )
    _check_apart(found)
    return found


def _check_apart(found: dict[str, Target]) -> None:
    """Two parameters in the same memory would have two masks, and one would not know of the other."""
    first_at: dict[tuple[Any, int], str] = {}
    for name, target in found.items():
        weight = target.module._parameters.get(target.parameter)
        if weight is None or is_lazy(weight) or type(weight.data) is not Tensor or weight.is_meta or not weight.numel():
            continue  # nothing there (a DTensor, a fake one: no address of its own)
        if (first := first_at.setdefault((weight.device, weight.data_ptr()), name)) != name:
            raise ValueError(
                f"mask_model: {first} and {name} are two Parameters in the same memory; make them one "
                "(module.weight = other.weight), or exclude one of them"
            )


_Key = tuple[str, str]  # module's name, parameter's name in it


class _Map:
    """The model's modules and parameters by name, and what patterns match of them."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.order: dict[_Key, int] = {}
        self._places: dict[int, list[_Key]] = {}
        for name, module in self.modules.items():
            for own in (*module._parameters, "weight"):  # a computed weight has a place too: it is refused by name
                self.order.setdefault((name, own), len(self.order))
            for own, value in module._parameters.items():
                if value is not None:
                    self._places.setdefault(id(value), []).append((name, own))
        getter = getattr(model, "get_output_embeddings", None)
        self.head = getter() if callable(getter) else None

    def places(self, key: _Key) -> list[_Key]:
        """Where the parameter that is at ``key`` can be found: its first place, and those that share it."""
        return self._places.get(id(self.modules[key[0]]._parameters.get(key[1])), [key])

    def possible(self) -> str:
        """What could be masked, for an error message."""
        found = [(name, module) for name, module in self.modules.items() if _is_maskable(module)]
        names = [f"{name or '(the model itself)'} ({type(module).__name__})" for name, module in found]
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        return f"what could be masked: {', '.join(names[:12]) or 'nothing by default (parameters can be named)'}{more}"

    def is_read(self, name: str, module: nn.Module) -> bool:
        """Whether the code of a module around it reads its weight without calling it."""
        if module is self.head:
            return True
        own = name.rpartition(".")[2]
        while name:
            name = name.rpartition(".")[0]
            if own in _weights_read_by(type(self.modules[name])):
                return True
        return False

    def is_implicit(self, key: _Key) -> bool:
        """Whether the default and groups leave it out: the output head's weight, and tied weights."""
        return self.modules[key[0]] is self.head or len(self.places(key)) > 1

    def chosen(self, targets: Targets | None, argument: str) -> list[_Key]:
        """The parameters that ``targets`` (or exclude) names."""
        if targets is None or isinstance(targets, (str, type)):
            return list(self._matched(targets, argument))
        idle, keys = [], []
        for item in targets:
            found = list(self._matched(item, argument) if isinstance(item, type) else self._named(item, argument))
            idle += [] if found else [item]
            keys += found
        if idle:
            raise ValueError(
                f"mask_model: {argument} {idle} match nothing that can be masked; a list holds types, and names of "
                f"modules or parameters, whole or their last parts; {self.possible()}"
            )
        return keys

    def _matched(self, pattern: Pattern | None, argument: str) -> Iterator[_Key]:
        """What one regex, type, group or None (the default) matches."""
        if pattern is None or pattern in _GROUPS:
            kinds = _BY_DEFAULT if pattern is None else _GROUPS[str(pattern)]
            for name, module in self.modules.items():
                if isinstance(module, kinds) or (kinds[0] is nn.Linear and is_hf_conv1d(module)):
                    keys = ((name, own) for own in _weights_of(module))
                    yield from (key for key in keys if argument == "exclude" or not self.is_implicit(key))
        elif isinstance(pattern, type):
            for name, module in self.modules.items():
                if isinstance(module, pattern):
                    yield from self._all_of(name, module, argument)
        else:
            yield from self._by_regex(pattern, argument)

    def _by_regex(self, pattern: str, argument: str) -> Iterator[_Key]:
        """A regex names whole modules (their weights) or, if it fits no module that can be masked, whole parameters."""
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"mask_model: {argument} {pattern!r} is not a regular expression: {error}") from None
        fits_module = False
        for name, module in self.modules.items():
            if name and regex.fullmatch(name) and (_is_maskable(module) or argument == "exclude"):
                fits_module = True
                yield from self._all_of(name, module, argument)
        if not fits_module:
            yield from (key for key in self.order if regex.fullmatch(_full(*key)) and self._is_there(key))

    def _named(self, item: str, argument: str) -> Iterator[_Key]:
        """What a name in a list stands for: modules of that (last part of a) name, or parameters."""
        if item in _GROUPS:
            yield from self._matched(item, argument)
            return
        for name, module in self.modules.items():
            if _ends(name or type(module).__name__, item.removesuffix(".weight")):
                found = list(self._all_of(name, module, argument))
                if not found and argument == "targets" and not isinstance(module, nn.ModuleList | nn.Sequential):
                    raise ValueError(f"mask_model: {name or 'the model'} is a {type(module).__name__}, which has no "
                                     "weight of its own to mask; name its parts")  # fmt: skip
                yield from found
            elif "." not in item or _ends(name, item.rpartition(".")[0]):
                own = item.rpartition(".")[2]
                if own != "weight" and self._is_there((name, own)):
                    yield (name, own)

    def _all_of(self, name: str, module: nn.Module, argument: str) -> Iterator[_Key]:
        """What a module stands for that was named itself, or by its type: its weights, or to exclude, all it owns."""
        yield from ((name, own) for own in (module._parameters if argument == "exclude" else _weights_of(module)))
        if isinstance(module, nn.MultiheadAttention):
            yield from self._all_of(f"{name}.out_proj" if name else "out_proj", module.out_proj, argument)

    def _is_there(self, key: _Key) -> bool:
        return self.modules[key[0]]._parameters.get(key[1]) is not None


def _by_patterns(model_map: _Map, targets: Mapping[Pattern, Options]) -> dict[_Key, Options]:
    """Each parameter with the options of the first pattern that matches it."""
    chosen: dict[_Key, Options] = {}
    for pattern, options in targets.items():
        if not isinstance(pattern, (str, type)):
            raise TypeError(f"mask_model: a key of targets must be a regex, group or type, got {pattern!r}")
        if not isinstance(options, Mapping) or set(options) - set(OPTIONS):
            raise TypeError(f"mask_model: targets[{pattern!r}] must be a dict of {', '.join(OPTIONS)}, got {options!r}")
        found = model_map.chosen(pattern, "targets")
        if not found:
            raise ValueError(
                f"mask_model: targets {pattern!r} match nothing; a string that is a key must match whole names, as in "
                f"r'.*c_attn'; {model_map.possible()}"
            )
        taken = {place for key in chosen for place in model_map.places(key)}
        chosen.update({key: options for key in found if key not in taken})
    return chosen


@cache
def _weights_read_by(cls: type) -> frozenset[str]:
    """The names of the submodules whose weight the class's code reads: "head" where it says ``self.head.weight``."""
    names: set[str] = set()
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for name, value in vars(base).items():
            value = value.fget if isinstance(value, property) else value
            code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
            if code is not None and not name.startswith(_SETUP):
                names.update(_weights_read_in(code))
    return frozenset(names)


def _weights_read_in(code: CodeType) -> Iterator[str]:
    """The same of one function and those inside it."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _weights_read_in(constant)
    steps = [("", ""), *((step.opname, step.argval) for step in dis.get_instructions(code))]
    for asked, _, owner, read, after in zip(steps, steps[1:], steps[2:], steps[3:], steps[4:], strict=False):
        is_question = (after[0] in ("LOAD_ATTR", "LOAD_METHOD") and after[1] in _QUESTIONS) or asked[1] == "isinstance"
        if owner[0] == "LOAD_ATTR" and read == ("LOAD_ATTR", "weight") and not is_question:
            yield owner[1]


def _weights_of(module: nn.Module) -> list[str]:
    """The names of the parameters that a module stands for when it is matched."""
    if isinstance(module, nn.MultiheadAttention):
        return [own for own in _MHA_INPUTS if module._parameters.get(own) is not None]
    if "weight" in module._parameters or _is_maskable(module):
        return ["weight"] if module._parameters.get("weight") is not None or _is_maskable(module) else []
    return [own for own, value in module._parameters.items() if value is not None and value.dim() > 1]


def _is_maskable(module: nn.Module) -> bool:
    return isinstance(module, _MASKABLE) or is_hf_conv1d(module)


def _ends(name: str, bare: str) -> bool:
    return name == bare or name.endswith("." + bare)


def _full(module_name: str, parameter: str) -> str:
    return f"{module_name}.{parameter}" if module_name else parameter


def _is_given(exclude: Targets) -> bool:
    return isinstance(exclude, (str, type)) or len(exclude) > 0


def _check_form(argument: str, value: object) -> None:
    items = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    if value is not None and not all(isinstance(item, (str, type)) for item in items):
        raise TypeError(
            f"mask_model: {argument} must be a regex, 'all-linear', 'all-conv', 'all-embedding', a module type, a list "
            f"of names and types{', or a dict of those to options' if argument == 'targets' else ''}, got {value!r}"
        )
