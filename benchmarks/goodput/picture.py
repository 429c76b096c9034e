"""The picture of the goodput: by the mean time between kills, measured points on the curve of the model."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from benchmarks.goodput.systems import LABELS

COLORS = {"ours": "#22437c", "accelerate": "#e6a04d", "dcp": "#d1603d"}
INK, GRID = "#404040", "#e4e4e4"
TICKS = {10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h"}


def goodput_png(systems: dict[str, Any]) -> bytes:
    """Returns a PNG of 760 × 480 pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.8), dpi=100, layout="constrained")
    axes = figure.subplots()
    for name, system in systems.items():
        x, y = zip(*((point["mean_seconds"], 100 * point["goodput"]) for point in system["curve"]), strict=True)
        axes.plot(x, y, color=COLORS[name], linewidth=2)
        measured = [(window["mean_seconds"], 100 * window["goodput"]) for window in system["windows"]]
        axes.plot(*zip(*measured, strict=True), "o", color=COLORS[name], markersize=7, clip_on=False, zorder=3)
    axes.set_xscale("log")
    axes.set_xticks(list(TICKS), list(TICKS.values()))
    axes.set_xticks([], minor=True)
    axes.set(xlabel="mean time between two kills", ylabel="goodput: productive ÷ wall time, %")
    axes.set(xlim=(10, 14_400), ylim=(0, 101))
    _label(axes, systems)
    axes.tick_params(colors=INK)
    for part in (axes.xaxis.label, axes.yaxis.label, axes.spines[:]):
        part.set_color(INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    file = BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _label(axes: Any, systems: dict[str, Any]) -> None:
    """Names each curve at its last measured point, the best one on top, with the images that its runs lost."""
    best_first = sorted(systems, key=lambda name: -systems[name]["windows"][-1]["goodput"])
    for place, name in enumerate(best_first):
        windows = systems[name]["windows"]
        lost, repeated = (sum(window[f"{what}_images"] for window in windows) for what in ("lost", "repeated"))
        axes.annotate(
            f"{LABELS[name]}: {lost:,} images lost, {repeated:,} repeated",
            (windows[-1]["mean_seconds"], 100 * windows[-1]["goodput"]),
            xytext=(0.32, 0.3 - 0.09 * place),
            textcoords="axes fraction",
            color=COLORS[name],
            arrowprops={"arrowstyle": "-", "color": COLORS[name], "linewidth": 0.8, "shrinkB": 5, "relpos": (0, 0.5)},
        )
