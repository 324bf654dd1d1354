"""`break_it_down`: is each subroutine of a compositional task done by a part of the network of its own?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from ..evaluation import Test
from ..report.page import Table
from ..sharing import Sharing, check_subnets, shared_weights
from ..subnet import Subnet
from .accuracies import accuracies_of, check_functions, function_accuracies

TIE = 1e-6  # accuracies closer than this are equal: tests often return fp32
MIN_OWN = 0.9  # the authors': a mask that does its own task less well has quality 0
_ACCURACIES = {
    "sub_target": ("subnet", "target"), "sub_other": ("subnet", "other"),
    "abl_target": ("ablated", "target"), "abl_other": ("ablated", "other"),
}  # fmt: skip
Setting = TypeVar("Setting")
Subnets = Mapping[str, Subnet]


@dataclass(frozen=True)
class Subroutine:
    """Accuracies of one subroutine's subnet, as measured, and what the protocol makes of them.

    ``acc+ = max(acc, chance)`` where ``clip`` is set, else the accuracy itself. With more than two functions, "other"
    is the mean over all but the target, each clipped first.

    Attributes:
        name: the target function.
        density: fraction of the masked weights in the subnet.
        own: accuracy of the subnet on the task that it was trained on.
        subnet, ablated: function to raw accuracy of the subnet alone (Sub), and of the network without it (Abl).
        chance: accuracy of guessing.
        clip: whether accuracies below chance count as chance.
        margin: a difference up to it, or up to 1e-6, which is rounding, counts as none.
    """

    name: str
    density: float
    own: float
    subnet: dict[str, float]
    ablated: dict[str, float]
    chance: float
    clip: bool = True
    margin: float = 0.0

    @property
    def delta_sub(self) -> float:
        """``acc+(Sub; target) - acc+(Sub; other)``: above 0 if the subnet does its own subroutine better."""
        return self._delta("subnet")

    @property
    def delta_abl(self) -> float:
        """``acc+(Abl; target) - acc+(Abl; other)``: below 0 if removing the subnet hurts its own subroutine more."""
        return self._delta("ablated")

    @property
    def quality(self) -> float:
        """Q: 0 if ``own`` is below .9, else ``acc+(Abl; other) - acc+(Abl; target)``.

        At most 1 - chance. It may be negative, so that a mask that fails its own task (0) beats one whose removal hurts
        the other function more.
        """
        return 0.0 if self.own < MIN_OWN - TIE else 0.0 - self.delta_abl

    @property
    def is_selective(self) -> bool:
        """Do both differences have the sign that a part of its own would give, by more than the margin?"""
        return not self.lacking

    @property
    def lacking(self) -> list[str]:
        """The differences that do not have that sign, as "delta_sub <= 0" and "delta_abl >= 0"."""
        least = max(self.margin, TIE)
        lacking = {f"delta_sub <= {self.margin:g}": self.delta_sub <= least}
        lacking[f"delta_abl >= {0.0 - self.margin:g}"] = self.delta_abl >= -least
        return [what for what, is_lacking in lacking.items() if is_lacking]

    def accuracy(self, part: str, on: str, *, clip: bool = False) -> float:
        """Return one of the four accuracies, raw or clipped.

        Args:
            part: "subnet" or "ablated".
            on: "target" or "other".
            clip: give acc+, which clips at chance whatever the attribute ``clip`` says.

        Raises:
            KeyError: another part or set.
        """
        accuracies = {"subnet": self.subnet, "ablated": self.ablated}[part]
        names = {"target": [self.name], "other": [name for name in accuracies if name != self.name]}[on]
        return statistics.fmean(max(accuracies[n], self.chance) if clip else accuracies[n] for n in names)

    def _delta(self, part: str) -> float:
        return self.accuracy(part, "target", clip=self.clip) - self.accuracy(part, "other", clip=self.clip)


@dataclass(frozen=True)
class BreakItDown:
    """Break It Down's measures of a network; `break_it_down` makes it.

    Attributes:
        subroutines: name to `Subroutine`.
        whole: function to accuracy of the network as it is.
        ablation: what removed weights became.
        sharing: what the subnets have in common; None for a single one.
        control: the same of a network with random weights; None if it was not run.
    """

    subroutines: dict[str, Subroutine]
    whole: dict[str, float]
    ablation: str
    sharing: Sharing | None = None
    control: BreakItDown | None = None

    def __getitem__(self, name: str) -> Subroutine:
        """The subroutine of this name."""
        return self.subroutines[name]

    def is_compositional(self, name: str) -> bool | None:
        """Return whether a subroutine has a part of its own: delta_sub > 0 and delta_abl < 0, by more than the
        margin, and not both in the control with random weights. None where both hold and no control was run."""
        if not self[name].is_selective:
            return False
        return None if self.control is None else not self.control[name].is_selective

    def verdict(self, name: str) -> str:
        """Return `is_compositional` in words, with the reason."""
        if not self[name].is_selective:
            return "no: " + " and ".join(self[name].lacking)
        answers = {None: "open: no control with random weights", True: "yes", False: "no: random weights show it too"}
        return answers[self.is_compositional(name)]

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict per subroutine, and per subroutine of the control.

        Keys: subroutine, base ("trained", "random"), density, own, sub_target, sub_other, abl_target, abl_other (raw),
        delta_sub, delta_abl (of clipped accuracies, if they are), delta_sub_raw, delta_abl_raw, quality, verdict.
        """
        rows = [_row(one, "trained", self.verdict(name)) for name, one in self.subroutines.items()]
        return rows + [_row(one, "random", "") for one in (self.control.subroutines.values() if self.control else ())]

    def table(self) -> Table:
        """Return `rows` as a table: raw accuracies, and differences and Q of what they count as."""
        shown = ("density", "own", *_ACCURACIES, "delta_sub", "delta_abl", "quality")
        lines = [
            [f"{r['subroutine']}, {r['base']}", *(f"{round(r[key], 4) + 0.0:.4f}" for key in shown), r["verdict"]]
            for r in self.rows()
        ]
        return Table(f"Break It Down (ablation: {self.ablation})", ["subroutine", *shown, "compositional"], lines)


def break_it_down(
    model: nn.Module, subnets: Subnets, evaluate: Mapping[str, Test], *, chance: float,
    own: Mapping[str, Test] | None = None, clip: bool = True, margin: float = 0.0,
    ablation: str = "zero", seed: int = 0,
    random_model: nn.Module | None = None, random_subnets: Subnets | Callable[[nn.Module], Subnets] | None = None,
) -> BreakItDown:  # fmt: skip
    """Return whether the network does each subroutine in a part of its own (structural compositionality).

    For subroutine i with mask m_i: ``Sub_i = m_i * W`` and ``Abl_i = (1 - m_i) * W`` are tested on data that only the
    target subroutine i decides, and on data that only another one decides. A part of its own shows in
    ``acc+(Sub_i; target) > acc+(Sub_i; other)`` and ``acc+(Abl_i; target) < acc+(Abl_i; other)``, and not in masks that
    were trained on random weights, for masks alone can learn a subroutine.

    Args:
        model: unmasked network that the subnets were found in; restored bit for bit. Its train or eval mode is the
            caller's business.
        subnets: subroutine to the subnet that was trained on data which isolates it.
        evaluate: function's name to test, ``test(model) -> accuracy`` from 0 to 1 on data that only this function
            decides; two or more, among them one per subnet.
        chance: accuracy of guessing, in [0, 1): 1/4 for four items.
        own: subroutine to test on data like the mask's training data, for Q; None takes its test of ``evaluate``.
        clip: count accuracies below chance as chance, as the authors do. Raw ones are kept and shown as well.
        margin: differences up to it count as none in the verdict. Set it above your tests' sampling error (1,000
            examples at chance 1/4: accuracies have a standard deviation of .014); at 0, the definition to the letter,
            mere noise of the control can pass for a part of its own.
        ablation, seed: what becomes of ablated weights, as in `function_accuracies`.
        random_model: the same architecture with random weights, unmasked; restored bit for bit.
        random_subnets: masks that were trained on it in the same way, of the same names, or a function of it that
            trains them.

    Raises:
        TypeError: tests that are no functions or return no number, subnets that are none.
        ValueError: chance or margin out of range, an unknown ablation, fewer than two functions, a subnet without a
            test, masks of different names or shapes, half a control, or an accuracy that is not from 0 to 1.

    Source: Lepori, Serre, Pavlick, "Break It Down: Evidence for Structural Compositionality in Neural Networks"
    (NeurIPS 2023): zero and random ablation, clipping, Q.
    """
    caller = "break_it_down"
    check_functions(evaluate, "evaluate", caller)
    if len(evaluate) < 2:
        raise ValueError(f"{caller}: evaluate must have the target's test and another one, got only {list(evaluate)}")
    if isinstance(chance, bool) or not isinstance(chance, (int, float)) or not 0 <= chance < 1:
        raise ValueError(f"{caller}: chance must be in [0, 1), the accuracy of guessing, got {chance!r}")
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < 1:
        raise ValueError(f"{caller}: margin must be in [0, 1), a difference of accuracies, got {margin!r}")
    if (random_model is None) != (random_subnets is None):
        raise ValueError(f"{caller}: the control needs both random_model and random_subnets, got one of them")
    if random_model is not None and random_model is model:
        raise ValueError(f"{caller}: random_model must be another network than model, with random weights")
    own = evaluate if own is None else own
    check_functions(own, "own", caller)

    def measure(base: nn.Module, masks: Subnets) -> BreakItDown:
        _check_masks(masks, evaluate, own, caller)
        found = function_accuracies(base, masks, evaluate, ablation=ablation, seed=seed, caller=caller)
        subroutines = {}
        for name, subnet in masks.items():
            if own[name] is evaluate[name]:
                its_own = found.subnet[name][name]
            else:
                with subnet.applied(base):
                    its_own = accuracies_of(base, {name: own[name]}, caller)[name]
            subroutines[name] = Subroutine(
                name, subnet.density(), its_own, found.subnet[name], found.ablated[name], float(chance), clip, margin
            )
        sharing = shared_weights(masks) if len(masks) > 1 else None
        return BreakItDown(subroutines, found.whole, ablation, sharing)

    result = measure(model, subnets)
    if random_model is None:
        return result
    masks = random_subnets(random_model) if callable(random_subnets) else random_subnets
    if not isinstance(masks, Mapping) or set(masks) != set(subnets):
        got = list(masks) if isinstance(masks, Mapping) else type(masks).__name__
        raise ValueError(f"{caller}: random_subnets must have the subroutines {list(subnets)}, got {got}")
    return replace(result, control=measure(random_model, masks))


def choose_by_quality(grid: Mapping[Setting, BreakItDown]) -> dict[str, Setting]:
    """Return subroutine to the setting of highest quality Q; the first one on ties, in the order of the mapping.

    Choose on validation data, for each base network and subroutine by itself, and report on other data.

    Args:
        grid: setting (rate, initial score, first masked layer, ...) to its result, all of the same subroutines.

    Raises:
        ValueError: an empty grid, or results of different subroutines.
    """
    if not grid:
        raise ValueError("choose_by_quality: grid must have one result or more, got none")
    names = [list(result.subroutines) for result in grid.values()]
    if any(set(its) != set(names[0]) for its in names):
        raise ValueError(f"choose_by_quality: all results must have the same subroutines, got {names}")
    best = {name: max(result[name].quality for result in grid.values()) for name in names[0]}
    return {
        name: next(setting for setting, result in grid.items() if result[name].quality >= best[name] - TIE)
        for name in names[0]
    }


def _check_masks(subnets: Subnets, evaluate: Mapping[str, Test], own: Mapping[str, Test], caller: str) -> None:
    if not isinstance(subnets, Mapping) or not subnets:
        raise ValueError(f"{caller}: subnets must map subroutines to subnets, got {subnets!r}")
    check_subnets(subnets, caller)
    for what, tests in (("evaluate", evaluate), ("own", own)):
        without = [name for name in subnets if name not in tests]
        if without:
            where = f"{what}, which has {list(tests)}"
            raise ValueError(f"{caller}: every subroutine needs its accuracy in {where} and not {without}")


def _row(one: Subroutine, base: str, verdict: str) -> dict[str, Any]:
    raw = {key: one.accuracy(*which) for key, which in _ACCURACIES.items()}
    return {
        "subroutine": one.name, "base": base, "density": one.density, "own": one.own, **raw,
        "delta_sub": one.delta_sub, "delta_abl": one.delta_abl,
        "delta_sub_raw": raw["sub_target"] - raw["sub_other"], "delta_abl_raw": raw["abl_target"] - raw["abl_other"],
        "quality": one.quality, "verdict": verdict,
    }  # fmt: skip
