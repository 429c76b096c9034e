"""The picture of the goodput over the mean time between kills: measured points, and the curves of the model."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from benchmarks.goodput.systems import LABELS

COLORS = {"ours": "#22437c", "accelerate": "#e6a04d", "dcp": "#d1603d"}
TICKS = {10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h"}


def goodput_png(curves: dict[str, dict[float, float]], points: dict[str, list[dict[str, Any]]]) -> bytes:
    """Returns a PNG of 760 × 480 pixels; each curve has its name at its last measured point, the best one on top.

    Args:
        curves: goodput in % by mean seconds between kills, for each system.
        points: `mean_seconds`, `goodput` in %, `lost_images` and `repeated_images` of each measurement.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.8), dpi=100, layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(sorted(curves, key=lambda name: -points[name][-1]["goodput"])):
        color, measured = COLORS[name], [(point["mean_seconds"], point["goodput"]) for point in points[name]]
        axes.plot(list(curves[name]), list(curves[name].values()), color=color, linewidth=2)
        axes.plot(*zip(*measured, strict=True), "o", color=color, markersize=7, clip_on=False, zorder=3)
        lost, repeated = (sum(point[f"{what}_images"] for point in points[name]) for what in ("lost", "repeated"))
        axes.annotate(
            f"{LABELS[name]}: {lost:,} images lost, {repeated:,} repeated",
            measured[-1],
            xytext=(0.32, 0.3 - 0.09 * place),
            textcoords="axes fraction",
            color=color,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkB": 5, "relpos": (0, 0.5)},
        )
    axes.set_xscale("log")
    axes.set_xticks(list(TICKS), list(TICKS.values()))
    axes.set_xticks([], minor=True)
    axes.set(xlabel="mean time between two kills", ylabel="goodput: productive ÷ wall time, %")
    axes.set(xlim=(10, 14_400), ylim=(0, 101))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    file = BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
