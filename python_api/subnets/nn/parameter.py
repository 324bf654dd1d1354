"""MaskedParameter: a mask over one parameter of any module, applied wherever the parameter is read.

Layers that have a masked twin (MaskedLinear, MaskedConv2d, MaskedHFConv1D) use the mask in their own forward pass. For
everything else the owning module gets a class with a property in the parameter's place: whoever reads
``module.weight``, be it the module's own forward pass, the fast path of nn.TransformerEncoderLayer or a loss that reads
``lm_head.weight``, gets ``weight * mask``. The parameter itself stays under its name, so parameters(), state_dict() and
hooks see the base weight. (torch.nn.utils.parametrize does the same, but renames the parameter in the state dict, and
its modules can't be pickled.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from subnet_kernels.backends.base import keeps_w_eff
from subnet_kernels.dispatch import choose_for
from subnet_kernels.masks import MaskKind, SampledKind
from subnet_kernels.ops.checks import check_weight_and_scores
from subnet_kernels.ops.effective_weight import effective_weight_unchecked, is_transformed, is_vmapped
from subnet_kernels.shards import is_sharded

from .base import MaskedLayer, MaskState, Unit, check_can_mask, check_loaded, unit_shape

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_MASKS = "_masks_of_parameters"  # in the owner's __dict__: parameter's name -> MaskedParameter


class MaskedParameter(MaskedLayer):
    """The mask over ``owner.<parameter>``; a call gives ``weight * mask``. :func:`subnets.mask_model` makes them.

    It is the owner's submodule ``<parameter>_mask``, its scores are ``<parameter>_mask.scores``. ``weight`` is the base
    weight, the owner's own Parameter. Each read makes the effective weight anew while gradients are wanted; without
    gradients it is kept until scores, weight or beta change, and is then written anew in place.

    Attributes:
        owner: the module that holds the parameter.   parameter: its name there.
        sharers: other modules that hold it (tied weights), with its names there; they read through this mask too.
    """

    owner: nn.Module
    sharers: tuple[tuple[nn.Module, str], ...] = ()
    op = "effective_weight"
    _written = -1  # version of the kept effective weight when it was made: who was handed it may write into it

    def __init__(
        self, owner: nn.Module, parameter: str, *, kind: str | MaskKind = "sigmoid", score_init: float | Tensor = -0.1,
        unit: Unit = "weight", state: MaskState | None = None,
    ) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not as a submodule: the owner holds this one
        self.parameter = parameter
        self._add_mask(kind, score_init, unit, state)
        if isinstance(self.kind, SampledKind) and self.kind.samples > 1:
            raise ValueError(
                f"{type(owner).__name__}.{parameter}: kind {self.kind.name!r} draws {self.kind.samples} samples for a "
                "batch, and a parameter that is masked where it is read has one value for all of it; use samples=1"
            )

    @property
    def weight(self) -> nn.Parameter:  # pyright: ignore[reportIncompatibleVariableOverride]
        weight = self.owner._parameters[self.parameter]
        assert weight is not None
        return weight

    def weight_name(self, module_name: str) -> str:
        return module_name.removesuffix("_mask")

    def scores_name(self, weight_name: str) -> str:
        return f"{weight_name}_mask.scores"

    def _scores_shape(self, unit: Unit, where: str) -> tuple[int, ...]:
        shape = tuple(self.weight.shape)
        if not isinstance(self.owner, nn.modules.conv._ConvTransposeNd) or isinstance(unit, tuple) or unit == "weight":
            return unit_shape(unit, shape, where)
        if self.owner.groups > 1:
            raise ValueError(f"{where}: unit must be 'weight' or block sizes in a transposed convolution of groups")
        inputs_first = unit_shape(unit, (shape[1], shape[0], *shape[2:]), where)
        return (inputs_first[1], inputs_first[0], *inputs_first[2:])

    def _bind_scores(self) -> None:
        if "_parameters" in self.owner.__dict__:  # while both are copied, the owner may come last: it binds then
            super()._bind_scores()

    def forward(self) -> Tensor:
        if self._state.is_disabled or self._is_sharded():
            return self.weight
        if self._given is not None:
            return self._take_given()
        if self._wants_no_gradient():
            return self._kept_or_made()
        weight = self.weight
        made = effective_weight_unchecked(weight, self.scores, self._state.beta, self.current_kind, weight.dtype)
        if self._collects():
            self._collect(made[1])
        return made[0]

    def _is_sharded(self) -> bool:
        """Whether FSDP2 holds weight and scores, and so reads the parameter itself; the owner's forward pass, which
        could not use it so, runs with whole ones. Also refuses scores that its policy has cast."""
        if torch.compiler.is_compiling():
            return False
        if self.scores.dtype != torch.float32:
            check_weight_and_scores("effective_weight", self.weight, self.scores)
        return is_sharded(self.weight) and is_sharded(self.scores)

    def _wants_no_gradient(self) -> bool:
        """Whether the read may take a kept tensor: eager, outside of transforms, nothing that needs grad."""
        if torch.compiler.is_compiling() or not keeps_w_eff(self.plan) or self._state.penalties is not None:
            return False
        if torch.is_grad_enabled() and (self.scores.requires_grad or self.weight.requires_grad):
            return False
        if forward_ad._current_level >= 0:  # torch.autograd.forward_ad: a kept one has no tangent
            return False
        return not is_transformed("effective_weight") and not is_vmapped()

    def _kept_or_made(self) -> Tensor:
        weight, beta, kind = self.weight.detach(), self._state.beta, self.current_kind
        args = weight, self.scores.detach(), beta, kind, weight.dtype
        kept = self._slot.lookup(*args)
        if kept is not None and kept[0]._version == self._written:
            return kept[0]
        buffers = self._slot.to_fill(weight, args[1], beta, weight.dtype)
        backend = choose_for(self.op, weight, args[1], kind.name, weight.dtype, self.plan)
        w_eff, _ = backend.effective_weight(*args, buffers)
        if buffers is not None:
            self._slot.mark_fresh(*args)
            self._written = w_eff._version
        return w_eff

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, {self.mask_extra_repr()}"


def mask_parameter(
    owner: nn.Module, parameter: str, where: str, sharers: Sequence[tuple[nn.Module, str]] = (), **settings: Any
) -> MaskedParameter:
    """Mask ``owner.<parameter>`` in place; the modules that share it (name there) read through the same mask.

    Raises:
        ValueError: the module can't take it, or a setting does not fit; nothing is changed then.
    """
    check_can_mask(owner, where, parameter)
    for module, _ in ((owner, parameter), *sharers):
        _check_can_own(module, where)
    if hasattr(owner, f"{parameter}_mask"):
        raise ValueError(
            f"{where}: it has a {parameter}_mask already, where the mask of {parameter} would go; rename that, or "
            "leave this parameter out"
        )
    mask = MaskedParameter(owner, parameter, **settings)
    owner.add_module(f"{parameter}_mask", mask)
    for module, name in ((owner, parameter), *sharers):
        masks = {**module.__dict__.get(_MASKS, {}), name: mask}
        module.__dict__[_MASKS] = masks
        module.__class__ = _class_that_reads(_base_of(module), tuple(sorted(masks)))
    mask.sharers = tuple(sharers)
    return mask


def unmask_parameter(mask: MaskedParameter) -> nn.Module:
    """Take the mask away from its owner and from those that share the parameter, and return the owner."""
    for module, name in ((mask.owner, mask.parameter), *mask.sharers):
        base = _base_of(module)
        masks = {key: value for key, value in module.__dict__.pop(_MASKS).items() if key != name}
        module.__class__ = _class_that_reads(base, tuple(sorted(masks))) if masks else base
        if masks:
            module.__dict__[_MASKS] = masks
    del mask.owner._modules[f"{mask.parameter}_mask"]
    return mask.owner


def _check_can_own(module: nn.Module, where: str) -> None:
    name = type(module).__name__
    if isinstance(module, _CONTAINERS):
        raise ValueError(
            f"{where}: a {name}'s own parameters can't be masked: it would take the mask for one of its members"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"{where}: a {name} is compiled already; mask the module that it was scripted from")
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        raise ValueError(
            f"{where}: an {name} with max_norm rescales its weight in place at every use, which a mask can't follow; "
            "set max_norm to None"
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
        raise ValueError(
            f"{where}: an {name} with sparse=True makes sparse gradients, of which a mask's can't be made; "
            "set sparse to False"
        )


def _base_of(module: Any) -> type[nn.Module]:
    """The class that the module had before."""
    return getattr(type(module), "class_before_masking", type(module))


@cache
def _class_that_reads(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of ``base`` whose attributes ``names`` are read through their masks.

    It has no other base and no slots: a module's class can only be changed to one of the same layout.
    """

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        with torch.no_grad():  # an RNN reads its weights here to copy them; results of autograd can't be copied
            made = base.__reduce_ex__(self, protocol)
        assert isinstance(made, tuple)
        return (_new, (base, names), *made[2:])

    def __setstate__(self: nn.Module, state: dict[str, Any]) -> None:
        base.__setstate__(self, state)
        for mask in self.__dict__[_MASKS].values():
            if mask.__dict__.get("owner") is self:
                mask._bind_scores()

    def _load_from_state_dict(self: nn.Module, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        check_loaded(state_dict, *(prefix + name for name in names))
        base._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)

    def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        base._apply(self, fn, recurse)
        for mask in self.__dict__[_MASKS].values():
            mask._apply(fn)  # again: the scores' dtype follows the weight, which came after them
        return self

    methods = (__reduce_ex__, __setstate__, _load_from_state_dict, _apply)
    own = {method.__name__: method for method in methods} | {name: _reader(name) for name in names}
    return type(f"Masked{base.__name__}", (base,), {"class_before_masking": base, **own})


def _new(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = _class_that_reads(base, names)
    return cls.__new__(cls)


def _reader(name: str) -> property:
    def read(module: nn.Module) -> Tensor:
        try:
            return module.__dict__[_MASKS][name]()
        except AttributeError as error:  # nn.Module would look on, and find the base weight
            raise RuntimeError(f"the mask of {name} can't be read: {error}") from error

    return property(read)
