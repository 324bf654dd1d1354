"""`Subnet`: which weights of a network belong to a subnetwork, with its file, its algebra and its controls."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from . import subnet_file, subnet_folder
from .provenance import base_of
from .subnet_file import Contents, check_ranks, check_values, listed, weights_hash
from .subnet_fill import Fill, filler
from .subnet_fit import check_finite, check_same_parameters, check_unmasked, fitting_parameters, kept_values
from .subnet_heads import head_densities
from .subnet_ranks import ranks_of, top_parts
from .subnet_samples import sampled

Mode = Literal["keep", "ablate"]


class Subnet:
    """A set of weights of a network: one bool mask per parameter, True where the weight belongs to the subnet.

    Parameters that have no mask (biases, embeddings, ... as a rule) are not part of the question: `applied` and
    `transfer` leave them as they are.

    Args:
        masks: parameter name of the unmasked model (``"0.weight"``) to bool tensor of the parameter's shape. Copied to
            the CPU.
        provenance: where the subnet comes from: a dict that JSON can hold. Names that always mean the same, where they
            are known: base_model, architecture, method, beta, lam, seed, metrics, versions, task
            (`subnets.provenance.NAMED`).
        base_hash: `weights_hash` of the network that the subnet was found in, over the parameters named in ``masks``.
            `save` with ``weights=`` fills it in.
        weights: parameter name to the kept values ``[kept]`` in the C order of the mask, so that the subnet can be
            planted without its network.
        ranks: parameter name to uint8 ``[kept]``, how high each kept weight's score is, so that a fraction of the
            subnet can be planted; `with_ranks` makes them.

    Raises:
        TypeError: a mask is not a bool tensor, or the provenance cannot be written as JSON.
        ValueError: no mask, or values or ranks that do not fit the masks.

    >>> subnet = Subnet({"0.weight": torch.tensor([[True, False], [False, False]])}, {"task": "ab mod 7"})
    >>> subnet.density(), (~subnet).density(), subnet.iou(~subnet)
    (0.25, 0.75, 0.0)
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        provenance: Mapping[str, Any] | None = None,
        *,
        base_hash: str | None = None,
        weights: Mapping[str, Tensor] | None = None,
        ranks: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not isinstance(masks, Mapping):
            raise TypeError(
                f"Subnet: masks must be a dict of parameter name to bool tensor, got {type(masks).__name__}"
            )
        if not masks:
            raise ValueError("Subnet: masks must name at least one parameter, got an empty dict")
        for name, mask in masks.items():
            if not isinstance(name, str) or not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"Subnet: the mask of {name!r} must be a bool tensor, got {got}; pass scores > 0")
        self.masks: dict[str, Tensor] = {name: _own(mask) for name, mask in masks.items()}
        self.provenance: dict[str, Any] = _json_copy(provenance)
        self.base_hash = base_hash
        self.weights = self._fitting("weights", weights, check_values)
        self.ranks = self._fitting("ranks", ranks, check_ranks)

    def _fitting(
        self, what: str, given: Mapping[str, Tensor] | None, check: Callable[[str, Tensor, Tensor], None]
    ) -> dict[str, Tensor] | None:
        if given is None:
            return None
        if set(given) != set(self.masks):
            raise ValueError(f"Subnet: {what} must name the same parameters as masks, got {listed(given)}")
        for name, its in given.items():
            check(name, self.masks[name], its)
        return {name: _own(given[name]) for name in self.masks}

    # --- size

    def num_kept(self) -> int:
        """Return the number of weights in the subnet."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    @overload
    def density(self, per_layer: Literal[False] = False) -> float: ...
    @overload
    def density(self, per_layer: Literal[True]) -> dict[str, float]: ...
    def density(self, per_layer: bool = False) -> float | dict[str, float]:
        """Return the fraction of weights kept, over all masks together, or ``per_layer`` as a dict by parameter name.

        A mask without elements has density 0.
        """
        if per_layer:
            return {name: int(mask.sum()) / max(1, mask.numel()) for name, mask in self.masks.items()}
        return self.num_kept() / max(1, self._num_weights())

    def density_per_head(self, head_size: int, along: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """Return the density of each attention head, fp64 ``[heads]`` by parameter name.

        Heads are taken as blocks of ``head_size`` neighbours, in the order in which they lie: a GPT-2 ``c_attn`` gives
        the heads of the queries, then of the keys, then of the values; with grouped queries ``k_proj`` has fewer.
        Parameters that hold no heads are left out.

        Args:
            head_size: width of one head, as a rule ``hidden_size // num_attention_heads``.
            along: regex for whole parameter names to the dimension along which the heads lie, on top of the names that
                are known, as transformers and torch lay them out (`subnet_heads.HEADS_ALONG`: q_proj, query, c_attn,
                in_proj_weight, out_proj, W_Q, ...).

        Raises:
            ValueError: no parameter is known to hold heads, or the size does not divide into them.
        """
        return head_densities(self.masks, head_size, along, "Subnet.density_per_head")

    def _num_weights(self) -> int:
        return sum(mask.numel() for mask in self.masks.values())

    def __repr__(self) -> str:
        total = self._num_weights()
        values = ", with values" if self.weights else ""
        values += ", with ranks" if self.ranks else ""
        return (
            f"Subnet({len(self.masks)} parameters, {self.num_kept()} of {total} weights, "
            f"density {self.density():.4f}{values}, provenance={self.provenance})"
        )

    # --- its highest-scored part

    def with_ranks(self, scores: Mapping[str, Tensor], caller: str = "Subnet.with_ranks") -> Subnet:
        """Return the same subnet with the ranks of its weights by score, one byte per kept weight.

        Args:
            scores: parameter name to scores, of the mask's shape or of a unit's (``[rows, 1]``), such as
                ``{name: layer.scores for name, layer in masks.layers.items()}``, which is what
                ``MaskSet.subnet(ranks=True)`` passes.

        Raises:
            ValueError: other names or shapes than the masks', or scores that are not finite.
        """
        ranks = ranks_of(self.masks, scores, caller)
        return Subnet(self.masks, self.provenance, base_hash=self.base_hash, weights=self.weights, ranks=ranks)

    def top(self, fraction: float, caller: str = "Subnet.top") -> Subnet:
        """Return the highest-scored part of the subnet, over all parameters together.

        Weights of equal rank stay together: as many whole ranks as come nearest to ``fraction`` of the weights, and at
        least the highest, are kept. Up to 256 weights of different scores, that is their number rounded; above, it is
        right to a 256th of the subnet (`subnet_ranks` has the definition). Values and ranks come along.

        Args:
            fraction: in (0, 1].

        Raises:
            ValueError: ``fraction`` is out of range, or the subnet has no ranks.
        """
        is_number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
        if not is_number or not 0 < fraction <= 1:
            raise ValueError(f"{caller}: fraction must be a number in (0, 1], got {fraction!r}")
        if self.ranks is None:
            raise ValueError(
                f"{caller}: the subnet has no ranks, so its highest-scored part is not known; make it with "
                "MaskSet.subnet(ranks=True), DiscoveryConfig(keep_ranks=True) or Subnet.with_ranks(scores)"
            )
        parts = top_parts(self.ranks, fraction)
        masks = {name: torch.zeros_like(mask) for name, mask in self.masks.items()}
        for name, mask in masks.items():
            mask[self.masks[name]] = parts[name]
        weights = {name: values[parts[name]] for name, values in self.weights.items()} if self.weights else None
        ranks = {name: its[parts[name]] for name, its in self.ranks.items()}
        provenance = self._derived(operation="top", fraction=fraction)
        return Subnet(masks, provenance, base_hash=self.base_hash, weights=weights, ranks=ranks)

    # --- algebra: the results carry no values and no ranks; the base's hash stays where both sides agree on it

    def __and__(self, other: Subnet) -> Subnet:
        """Return the weights in both subnets."""
        return self._combined(other, "and", torch.logical_and)

    def __or__(self, other: Subnet) -> Subnet:
        """Return the weights in either subnet."""
        return self._combined(other, "or", torch.logical_or)

    def __sub__(self, other: Subnet) -> Subnet:
        """Return the weights of this subnet that are not in the other."""
        return self._combined(other, "minus", lambda a, b: a & ~b)

    def __invert__(self) -> Subnet:
        """Return the complement: all other weights of the same parameters."""
        masks = {name: ~mask for name, mask in self.masks.items()}
        return Subnet(masks, self._derived(operation="complement"), base_hash=self.base_hash)

    def iou(self, other: Subnet) -> float:
        """Return intersection over union, ``|A & B| / |A | B|`` in weights; 1.0 if both are empty."""
        self._check_same_parameters(other, "iou")
        pairs = [(mask, other.masks[name]) for name, mask in self.masks.items()]
        union = sum(int((a | b).sum()) for a, b in pairs)
        return sum(int((a & b).sum()) for a, b in pairs) / union if union else 1.0

    def _combined(self, other: Subnet, operation: str, combine: Callable[[Tensor, Tensor], Tensor]) -> Subnet:
        if not isinstance(other, Subnet):
            return NotImplemented
        self._check_same_parameters(other, operation)
        masks = {name: combine(mask, other.masks[name]) for name, mask in self.masks.items()}
        provenance = self._derived(other, operation=operation)
        return Subnet(masks, provenance, base_hash=self.base_hash if self.base_hash == other.base_hash else None)

    def _derived(self, *others: Subnet, **how: Any) -> dict[str, Any]:
        """Provenance of a subnet made of this one and others."""
        of = [subnet.provenance for subnet in (self, *others)]
        return {**base_of(*of), **how, "of": of}

    def _check_same_parameters(self, other: Subnet, operation: str) -> None:
        if not isinstance(other, Subnet):
            raise TypeError(f"Subnet {operation}: the other side must be a Subnet, got {type(other).__name__}")
        check_same_parameters(self.masks, other.masks, f"Subnet {operation}")

    # --- controls

    def sample_like(self, generator: torch.Generator, *, per_layer: bool = True) -> Subnet:
        """Return a random subnet with as many weights as this one, drawn from all its parameters' weights.

        Args:
            generator: a CPU `torch.Generator`; its state decides the draw and is advanced. The order of the masks plays
                no role.
            per_layer: as many weights in each parameter as this subnet has there; False: as many in all, wherever they
                fall, which also takes away how the subnet is spread over the network.
        """
        everything = {name: torch.ones_like(mask) for name, mask in self.masks.items()}
        return self._sampled(everything, generator, per_layer, "sample_like")

    def complement_sample(self, generator: torch.Generator, *, per_layer: bool = True) -> Subnet:
        """Return a random subnet with as many weights as this one, drawn from outside it. Arguments as `sample_like`.

        Raises:
            ValueError: more than half of the weights are kept (of a parameter, or of all with ``per_layer=False``), so
                that there are too few outside.
        """
        counts = {name: (int(mask.sum()), int((~mask).sum())) for name, mask in self.masks.items()}
        if not per_layer:
            counts = {"all parameters together": tuple(map(sum, zip(*counts.values(), strict=True)))}
        full = [f"{name} ({inside} inside, {out} outside)" for name, (inside, out) in counts.items() if inside > out]
        if full:
            also = ", per_layer=False" if per_layer and self.num_kept() * 2 <= self._num_weights() else ""
            raise ValueError(
                "Subnet.complement_sample: as many weights as the subnet has must exist outside it, which fails for "
                f"{listed(full)}; use sample_like{also}, or a sparser subnet"
            )
        outside = {name: ~mask for name, mask in self.masks.items()}
        return self._sampled(outside, generator, per_layer, "complement_sample")

    def _sampled(
        self, candidates: dict[str, Tensor], generator: torch.Generator, per_layer: bool, control: str
    ) -> Subnet:
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            raise TypeError(
                f"Subnet.{control}: generator must be a CPU torch.Generator, got {generator!r}; "
                "pass torch.Generator().manual_seed(seed)"
            )
        sizes = {name: int(mask.sum()) for name, mask in self.masks.items()}
        masks = sampled(candidates, sizes, generator, per_layer)
        how = {"control": control} if per_layer else {"control": control, "per_layer": False}
        return Subnet(masks, self._derived(**how), base_hash=self.base_hash)

    # --- on a model

    def parameters_in(self, model: nn.Module, caller: str = "Subnet.parameters_in") -> dict[str, nn.Parameter]:
        """Return the model's parameters that the masks belong to, by name; ``caller`` begins the error message.

        Raises:
            ValueError: a parameter is missing or differently shaped (all of them listed, with the model's parameters
                that the subnet does not know), has no floating-point values, or stands under two names of the subnet
                (tied weights: keep the mask of one name).
        """
        return fitting_parameters(self.masks, model, caller)

    @torch.no_grad()
    def apply_(
        self, model: nn.Module, mode: Mode = "keep", *, fill: Fill = "zero", generator: torch.Generator | None = None
    ) -> nn.Module:
        """Take weights out of ``model`` in place and return it: ``w * m`` ("keep") or ``w * (1 - m)`` ("ablate").

        Args:
            model: an unmasked model whose parameters fit; parameters without a mask are left alone.
            mode: "keep" takes out everything outside the subnet, "ablate" the subnet itself.
            fill: what becomes of the weights that are taken out. "zero"; "mean", the mean of their whole parameter;
                "reinit", fresh values by the model's own initialisation (transformers' ``_init_weights``, else the
                module's ``reset_parameters``); or another network, a module or a state dict, to take them from.
            generator: for "reinit", a CPU `torch.Generator`; its state decides the values and is advanced.

        Raises:
            ValueError: the subnet does not fit the model or ``fill``, an unknown mode or fill, or a parameter that the
                model has no way to initialise.
            TypeError: "reinit" without a generator.
            In each case nothing is changed.
        """
        write = self._writing(model, mode, fill, generator, "Subnet.apply_")
        write()
        return model

    @contextmanager
    def applied(
        self, model: nn.Module, mode: Mode = "keep", *, fill: Fill = "zero", generator: torch.Generator | None = None
    ) -> Iterator[nn.Module]:
        """Context in which ``model`` computes with the subnet alone ("keep") or without it ("ablate").

        Args and errors as for `apply_`. On leaving, also through an exception, the masked parameters get their former
        values back bit for bit; what the block wrote into them is lost. Costs one copy of these parameters.
        """
        write = self._writing(model, mode, fill, generator, "Subnet.applied")
        parameters = self.parameters_in(model)
        with torch.no_grad():
            saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            write()
            yield model
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(saved[name])

    def _writing(
        self, model: nn.Module, mode: Mode, fill: Fill, generator: torch.Generator | None, caller: str
    ) -> Callable[[], None]:
        """Check everything and return the function that writes."""
        parameters = self.parameters_in(model, caller)
        check_unmasked(model, caller)
        _check_mode(mode, caller)
        new_values = filler(fill, model, parameters, generator, caller)

        @torch.no_grad()
        def write() -> None:
            for name, parameter in parameters.items():
                mask = self.masks[name].to(parameter.device)
                taken, values = mask if mode == "ablate" else ~mask, new_values(name, parameter)
                if values.ndim:
                    parameter.copy_(torch.where(taken, values, parameter))
                else:
                    parameter.masked_fill_(taken, values)

        return write

    def to_dense(self, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Return parameter name -> ``w * m``: the kept values in place, zeros elsewhere, on the CPU.

        The masks themselves are ``subnet.masks``, dense bool tensors.

        Args:
            model: the network to take the values from; None takes those that the subnet carries.

        Raises:
            ValueError: there are no values, or the subnet does not fit ``model`` (other weights than it remembers
                included).
        """
        weights = self.weights if model is None else self.with_weights(model, "Subnet.to_dense").weights
        if weights is None:
            raise ValueError(
                "Subnet.to_dense: the subnet carries no values; pass the network, or load a file that was saved with "
                "weights= (the masks alone are subnet.masks)"
            )
        return {
            name: torch.zeros(mask.shape, dtype=weights[name].dtype).masked_scatter_(mask, weights[name])
            for name, mask in self.masks.items()
        }

    # --- file

    def save(self, path: str | os.PathLike[str], weights: nn.Module | None = None) -> None:
        """Write the subnet to a safetensors file: 1 bit per weight, and the kept values and ranks if there are any.

        The file is written under a temporary name and renamed, so ``path`` holds the old or the new subnet, never half.

        Args:
            path: file to write; an existing one is replaced.
            weights: the network that the subnet was found in; its kept values (only these) and its `weights_hash` go
                into the file, which can then be planted alone. None writes the values that the subnet carries, if any.

        Raises:
            ValueError: the subnet does not fit ``weights``, ``weights`` is another network than the one that the subnet
                remembers, or a kept value is not finite.
        """
        subnet = self if weights is None else self.with_weights(weights, "Subnet.save")
        contents = Contents(subnet.masks, subnet.provenance, subnet.weights, subnet.base_hash, subnet.ranks)
        subnet_file.write(path, contents)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Subnet:
        """Return the subnet of a file written by `save`, on the CPU; all of it is verified first.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is cut, damaged (a checksum covers every byte of names, shapes, masks, values and
                provenance), of another format or version, or contradicts itself.
        """
        masks, provenance, weights, base_hash, ranks = subnet_file.read(path)
        try:
            return cls(masks, provenance, base_hash=base_hash, weights=weights, ranks=ranks)
        except (TypeError, ValueError) as error:  # a provenance with numbers that JSON reads and does not write
            raise subnet_file.contradicting(path, error) from error

    def save_pretrained(self, folder: str | os.PathLike[str], weights: nn.Module | None = None) -> None:
        """Write a folder to share: ``subnet.safetensors``, as `save` writes it, and ``README.md``, a card that says
        what it is, of which model, its density and metrics, and how to load it.

        Args:
            folder: made if need be; what else lies in it stays. A card that was edited by hand, so that its line
                "Written by ..." is gone, stays too.
            weights: as for `save`.

        Raises:
            ValueError: as `save`.
        """
        subnet = self if weights is None else self.with_weights(weights, "Subnet.save_pretrained")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        subnet.save(folder / subnet_folder.FILE)
        subnet_folder.write_card(folder, subnet)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Subnet:
        """Return the subnet of a folder that `save_pretrained` wrote. Only ``subnet.safetensors`` is read, and nothing
        is downloaded: fetch a shared folder first (``huggingface_hub.snapshot_download`` returns its path).

        Raises:
            FileNotFoundError: there is no such folder, or no subnet in it.
            ValueError: as `load`.
        """
        return cls.load(subnet_folder.file_in(folder))

    def with_weights(self, model: nn.Module, caller: str = "Subnet.with_weights") -> Subnet:
        """Return the same subnet carrying ``model``'s kept values and hash. Errors as for `save`."""
        parameters = self.parameters_in(model, caller)
        base_hash = weights_hash(parameters)
        if self.base_hash is not None and self.base_hash != base_hash:
            raise ValueError(
                f"{caller}: weights must be the network that the subnet was found in, but its weights have hash "
                f"{base_hash[:12]} and the subnet remembers {self.base_hash[:12]}; pass that network, unmasked"
            )
        values = {name: kept_values(self.masks[name], parameter) for name, parameter in parameters.items()}
        check_finite(values, caller)
        return Subnet(self.masks, self.provenance, base_hash=base_hash, weights=values, ranks=self.ranks)


def _check_mode(mode: str, caller: str) -> None:
    if mode not in ("keep", "ablate"):
        raise ValueError(f"{caller}: mode must be 'keep' or 'ablate', got {mode!r}")


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", memory_format=torch.contiguous_format, copy=True)


def _json_copy(provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    if provenance is not None and not isinstance(provenance, Mapping):
        raise TypeError(f"Subnet: provenance must be a dict, got {type(provenance).__name__}")
    try:
        return json.loads(json.dumps(dict(provenance or {}), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"Subnet: provenance must hold only what JSON can ({error}); convert it first") from error
