"""What `subnets diff` shows of two subnets: what they share, and how much random ones would share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from subnets.report.drawing import new_figure
from subnets.report.page import Table
from subnets.report.subnet_pages import draw_by_depth, facts
from subnets.sharing import Overlap
from subnets.subnet import Subnet
from subnets.subnet_file import listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Comparison:
    """Two subnets side by side: ``overlaps`` of the parameters that both have in one shape, and names of the others."""

    overlaps: dict[str, Overlap]
    densities: dict[str, tuple[float, float]]
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, first: Subnet, second: Subnet) -> Comparison:
        """Compare the parameters that both mask.

        Raises:
            ValueError: no parameter of the same name and shape is in both.
        """
        common = [name for name, mask in first.masks.items() if name in second.masks]
        alike = [name for name in common if first.masks[name].shape == second.masks[name].shape]
        if not alike:
            raise ValueError(
                "the two subnets must mask at least one parameter of the same name and shape, got "
                f"{_shapes(first)} and {_shapes(second)}; were they found in the same model?"
            )
        overlaps, densities = {}, {}
        for name in alike:
            a, b = first.masks[name], second.masks[name]
            overlaps[name] = overlap = Overlap.of(a, b)
            densities[name] = overlap.first / max(a.numel(), 1), overlap.second / max(a.numel(), 1)
        return cls(
            overlaps, densities, [n for n in first.masks if n not in common],
            [n for n in second.masks if n not in common], [n for n in common if n not in alike],
        )  # fmt: skip

    def total(self) -> Overlap:
        """All compared parameters together."""
        return Overlap.total(self.overlaps.values())

    def table(self) -> Table:
        """Per parameter and in all: sizes, IoU, and the IoU of random subnets with as many weights."""
        rows = [
            [name, f"{o.first:,}", f"{o.second:,}", f"{o.both:,}", f"{o.iou():.4f}", f"{o.iou_by_chance():.4f}"]
            for name, o in {**self.overlaps, "all": self.total()}.items()
        ]
        return Table("Weights kept", ["parameter", "first", "second", "both", "IoU", "by chance"], rows)

    def figure(self) -> Figure:
        """Left IoU by depth, dashed by chance; right the densities of each parameter in both."""
        figure, (left, right) = new_figure(2, size=(12.0, 4.4))
        draw_by_depth(
            left, {n: o.iou() for n, o in self.overlaps.items()},
            {n: o.iou_by_chance() for n, o in self.overlaps.items()},
        )  # fmt: skip
        left.set_ylabel("IoU (dashed: by chance)")
        x, y = zip(*self.densities.values(), strict=True)
        top = 1.05 * max(*x, *y) or 1.0
        right.plot([0, top], [0, top], color="#bbbbbb", linewidth=0.9)
        right.plot(x, y, "o", markersize=4)
        right.set(xlabel="density in the first", ylabel="density in the second", xlim=(0, top), ylim=(0, top))
        right.grid(alpha=0.3)
        return figure


def comparison_facts(first: Subnet, second: Subnet, comparison: Comparison) -> dict[str, str]:
    """What there is to say besides the table: both sizes, whether the base is the same, what is compared, the IoU."""
    said = {name: f"{facts(s, None)['size']}" for name, s in (("first", first), ("second", second))}
    said["base"] = _base_fact(first, second)
    apart = [
        ("only in first", comparison.only_first), ("only in second", comparison.only_second),
        ("other shape", comparison.reshaped),
    ]  # fmt: skip
    said.update({what: listed(names) for what, names in apart if names})
    where = "in all" if not any(names for _, names in apart) else "of what both mask"
    said[f"intersection over union {where}"] = f"{comparison.total().iou():.4f}"
    return said


def _base_fact(first: Subnet, second: Subnet) -> str:
    if first.base_hash is None or second.base_hash is None:
        return "not recorded in both: whether they are subnets of one network can't be told"
    if first.base_hash == second.base_hash:
        return f"the same network (base hash {first.base_hash[:12]})"
    hashes = f"base hashes {first.base_hash[:12]} and {second.base_hash[:12]}"
    if set(first.masks) != set(second.masks):
        return f"can't be told: the {hashes} are over different parameters"
    return (
        f"different networks ({hashes}): a weight has no counterpart in the other network, unless both were trained "
        "from one initialisation; expect an IoU near chance"
    )


def _shapes(subnet: Subnet) -> str:
    return listed((f"{name} {list(mask.shape)}" for name, mask in subnet.masks.items()), 3)
