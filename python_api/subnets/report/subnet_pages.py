"""What `subnets inspect` shows of a subnet: facts, tables and figures, for the terminal and as parts of a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subnets.report.drawing import new_figure, save_figure
from subnets.report.page import Table, image, paragraph
from subnets.report.places import heads_by_projection, places_of
from subnets.subnet import Subnet
from subnets.subnet_heads import head_dimension

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# --- one subnet: facts and tables ------------------------------------------------------------------------------------


def layer_rows(subnet: Subnet) -> list[dict[str, Any]]:
    """One dict per parameter: name, role, depth (None where its name has no number), shape, kept, density."""
    places, densities = places_of(list(subnet.masks)), subnet.density(per_layer=True)
    return [
        {
            "name": name, "role": places[name].role, "depth": places[name].depth, "shape": list(mask.shape),
            "kept": int(mask.sum()), "density": densities[name],
        }
        for name, mask in subnet.masks.items()
    ]  # fmt: skip


def facts(subnet: Subnet, heads: int | None) -> dict[str, str]:
    """What there is to say besides tables: size, provenance, base, kept values, and what is not shown and why."""
    total = sum(mask.numel() for mask in subnet.masks.values())
    said = {
        "size": f"{subnet.num_kept():,} of {total:,} weights, density {subnet.density():.4f}",
        "provenance": json.dumps(subnet.provenance),
        "base hash": subnet.base_hash or "not recorded",
        "kept values": "not in the file" if subnet.weights is None else "in the file: it can be planted alone",
    }
    if subnet.ranks is None:
        said["scores"] = "no ranks of the scores in the file, so no histogram of them"
    projections = [m for name, m in subnet.masks.items() if head_dimension(name, subnet.masks) is not None]
    if heads is None and any(mask.ndim == 2 for mask in projections):
        said["heads"] = "pass --heads N, the model's number of attention heads, for densities by head"
    return said


def subnet_tables(subnet: Subnet, heads: int | None) -> list[Table]:
    """By parameter; by role, where a role has several parameters; by head, where heads can be told."""
    rows = layer_rows(subnet)
    lines = [[r["name"], str(r["shape"]), f"{r['kept']:,}", f"{r['density']:.4f}"] for r in rows]
    tables = [Table("By parameter", ["parameter", "shape", "kept", "density"], lines)]
    if len({row["role"] for row in rows}) < len(rows):
        tables.append(_role_table(rows))
    if maps := head_maps(subnet, heads):
        tables.append(_head_table(maps))
    if (ranks := subnet.ranks) is not None:
        tables.append(_rank_table(ranks))
    return tables


def _role_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    roles: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        roles.setdefault(row["role"], []).append(row)
    lines = []
    for role, members in roles.items():
        kept, size = sum(row["kept"] for row in members), sum(math.prod(row["shape"]) for row in members)
        ordered = sorted(members, key=lambda row: row["density"])
        extremes = [f"{row['density']:.4f} ({_text(row['depth'])})" for row in (ordered[0], ordered[-1])]
        lines.append([role, str(len(members)), f"{kept:,}", f"{kept / max(size, 1):.4f}", *extremes])
    return Table("By role", ["role", "parameters", "kept", "density", "lowest (depth)", "highest (depth)"], lines)


def heads_of(subnet: Subnet) -> int | None:
    """The number of attention heads that the file itself names, ``provenance["num_heads"]``; None without it, or where
    it can't be that of these masks."""
    heads = subnet.provenance.get("num_heads")
    if type(heads) is not int:
        return None
    try:
        head_maps(subnet, heads)
    except ValueError:
        return None
    return heads


@dataclass(frozen=True)
class HeadMap:
    """Densities of all heads of one projection: ``values`` [depths, heads], NaN where there is none."""

    label: str
    depths: list[str]
    values: Tensor

    def rows(self) -> list[list[float]]:
        """The densities by depth, each as long as it has heads."""
        return [row[~row.isnan()].tolist() for row in self.values]

    def extreme(self, largest: bool) -> str:
        """The densest or the emptiest head: "0.1234 (3.7)" is head 7 at depth 3."""
        fill = -1.0 if largest else 2.0
        values = self.values.nan_to_num(nan=fill)
        at = int(values.argmax() if largest else values.argmin())
        row, head = divmod(at, values.shape[1])
        return f"{float(values[row, head]):.4f} ({self.depths[row]}.{head})"


def head_maps(subnet: Subnet, heads: int | None) -> list[HeadMap]:
    """One map per attention projection ("attn.c_attn q"). See `subnets.report.places.heads_by_projection`."""
    places = places_of(list(subnet.masks))
    found: dict[str, dict[str, list[float]]] = {}
    for name, parts in heads_by_projection(subnet.masks, heads).items():
        depth = _text(places[name].depth)
        for part, values in parts.items():
            rows = found.setdefault(f"{places[name].role} {part}".strip(), {})
            rows[depth if depth not in rows else f"{depth} {name}"] = values
    maps = []
    for label, rows in found.items():
        values = torch.full((len(rows), max(len(row) for row in rows.values())), math.nan)
        for i, row in enumerate(rows.values()):
            values[i, : len(row)] = torch.tensor(row)
        maps.append(HeadMap(label, list(rows), values))
    return maps


def _head_table(maps: Sequence[HeadMap]) -> Table:
    rows = [
        [
            each.label, str(int((~each.values.isnan()).sum())), f"{float(each.values.nanmean()):.4f}",
            each.extreme(False), each.extreme(True),
        ]
        for each in maps
    ]  # fmt: skip
    return Table("By head", ["projection", "heads", "density", "emptiest (depth.head)", "densest (depth.head)"], rows)


def load_subnet(path: str) -> Subnet:
    """The subnet of a file, or of a folder that `Subnet.save_pretrained` wrote."""
    return Subnet.from_pretrained(path) if Path(path).is_dir() else Subnet.load(path)


def _ranks_by_role(ranks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Role -> ranks as fractions in [0, 1), fp32 ``[kept]``; roles that keep nothing are left out."""
    places, roles = places_of(list(ranks)), {}
    for name, its in ranks.items():
        roles.setdefault(places[name].role, []).append(its.float() / 256)
    joined = {role: torch.cat(parts) for role, parts in roles.items()}
    return {role: its for role, its in joined.items() if its.numel()}


def _rank_table(ranks: Mapping[str, Tensor]) -> Table:
    rows = [
        [role, f"{len(its):,}", f"{float(its.mean()):.3f}", f"{float((its >= 0.9).float().mean()):.3f}"]
        for role, its in _ranks_by_role(ranks).items()
    ]
    return Table("By score", ["role", "kept", "mean rank (0 to 1)", "share in the highest tenth"], rows)


# --- one subnet: figures and page ------------------------------------------------------------------------------------


def subnet_parts(subnet: Subnet, heads: int | None, folder: Path, prefix: str = "") -> list[str]:
    """Facts, figures and tables of one subnet as parts of a page (:func:`subnets.report.page.page`). The figures are
    written to ``folder`` too, as PNG: density.png; heads.png, where heads can be told; scores.png, where there are
    ranks; all after ``prefix``."""
    parts = [paragraph(f"{what}: {text}") for what, text in facts(subnet, heads).items()]
    caption = "Density by role and depth; the dashed line is the density of the whole subnetwork."
    parts.append(image(save_figure(_density_figure(subnet), folder / f"{prefix}density.png"), caption))
    if maps := head_maps(subnet, heads):
        parts.append(image(save_figure(_head_figure(maps), folder / f"{prefix}heads.png"), "Density of each head."))
    if (ranks := subnet.ranks) is not None:
        caption = "Where each role's scores lie among all scores of the subnetwork; a flat line is spread as the whole."
        parts.append(image(save_figure(_rank_figure(ranks), folder / f"{prefix}scores.png"), caption))
    return [*parts, *[table.html() for table in reversed(subnet_tables(subnet, heads))]]


def _density_figure(subnet: Subnet) -> Figure:
    figure, (axes,) = new_figure(size=(9.0, 4.4))
    draw_by_depth(axes, subnet.density(per_layer=True))
    axes.axhline(subnet.density(), color="#888888", linestyle="--", linewidth=1)
    axes.set_ylabel("density")
    return figure


def draw_by_depth(axes: Axes, values: Mapping[str, float], by_chance: Mapping[str, float] | None = None) -> None:
    """One line per role over depth, dashed what it is ``by_chance``; what has no depth stands behind by its name."""
    from matplotlib import colormaps

    places = places_of(list(values))
    roles: dict[str, list[str]] = {}
    others = []
    for name, place in places.items():
        if place.position is None:
            others.append(name)
        else:
            roles.setdefault(place.role, []).append(name)
    colors = colormaps["tab10" if len(roles) <= 10 else "tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    for i, (role, names) in enumerate(roles.items()):
        names.sort(key=lambda name: places[name].position or 0.0)
        x, color = [places[name].position or 0.0 for name in names], colors[i % len(colors)]
        axes.plot(x, [values[name] for name in names], "o-", markersize=4, linewidth=1.2, label=role, color=color)
        if by_chance is not None:
            axes.plot(x, [by_chance[name] for name in names], "--", linewidth=0.9, color=color)
    last = max((place.depth for place in places.values() if place.depth is not None), default=-1)
    behind = [last + 1.5 + i for i in range(len(others))]
    axes.plot(behind, [values[name] for name in others], "D", markersize=5, color="#444444")
    if by_chance is not None:
        axes.plot(behind, [by_chance[name] for name in others], "_", markersize=8, color="#444444")
    numbers = range(0, last + 1, max(1, (last + 1) // 16))
    labels = [*[str(number) for number in numbers], *[places[name].role for name in others]]
    axes.set_xticks([*numbers, *behind], labels, rotation=30 if others else 0, fontsize=8)
    axes.set_xlabel("depth (the number in the parameter's name)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if roles:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _head_figure(maps: Sequence[HeadMap]) -> Figure:
    columns = min(len(maps), 4)
    rows = -(-len(maps) // columns)
    most = max(len(each.depths) for each in maps)
    figure, all_axes = new_figure(columns, rows, (2.9 * columns + 1.0, (1.4 + 0.18 * most) * rows))
    top = max(float(each.values.nan_to_num(nan=0.0).max()) for each in maps) or 1.0
    for axes in all_axes[len(maps) :]:
        axes.set_axis_off()
    shown = None
    for axes, each in zip(all_axes, maps, strict=False):
        shown = axes.imshow(each.values.numpy(), cmap="viridis", vmin=0, vmax=top, aspect="auto")
        axes.set_title(each.label, fontsize=8)
        axes.set_yticks(range(len(each.depths)), each.depths, fontsize=6)
        axes.set_xticks(range(0, each.values.shape[1], max(1, each.values.shape[1] // 8)))
        axes.tick_params(axis="x", labelsize=6)
        axes.set_xlabel("head", fontsize=7)
        axes.set_ylabel("depth", fontsize=7)
    if shown is not None:
        figure.colorbar(shown, ax=all_axes, label="density", shrink=0.8)
    return figure


def _rank_figure(ranks: Mapping[str, Tensor], bins: int = 16) -> Figure:
    figure, (axes,) = new_figure(size=(9.0, 4.4))
    edges = [i / bins for i in range(bins + 1)]
    for role, its in _ranks_by_role(ranks).items():
        shares = torch.histc(its, bins, 0.0, 1.0) / len(its) * bins
        axes.stairs(shares.tolist(), edges, label=role)
    axes.set_xlabel("rank of the score among all kept weights (0 lowest, 1 highest)")
    axes.set_ylabel("density of the role's ranks")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _text(depth: int | None) -> str:
    return "-" if depth is None else str(depth)
