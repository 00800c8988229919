"""The plots of the page, each as SVG."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, nan
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from pcdvq_quantizer.codebooks import NamedCodebook
from pcdvq_quantizer.layer import LayerError
from pcdvq_quantizer.report.evaluations import Evaluations
from pcdvq_quantizer.report.figures import (
    INK,
    MARKERS,
    SERIES,
    legend_beside,
    new_figure,
    style,
    to_svg,
)
from pcdvq_quantizer.report.record import CheckpointRecord, mean

# Beyond it are no figures of models, only what damages or mocks them, and axes that overflow.
LARGEST = 1e12
# Spread of values from which on a logarithmic axis shows more.
LOG_RATIO = 4.0
Figures = Callable[[LayerError], float]


def plot_errors(record: CheckpointRecord) -> str:
    """Weight error, and output error where it is known, by layer number."""
    figures: list[tuple[str, Figures]] = [("weight error", lambda error: error.weight)]
    if all(layer.error.output is not None for layer in record.numbered):
        figures.append(("output error", lambda error: error.output or 0.0))
    with style():
        figure, axes = new_figure(0.6 + 2.4 * len(figures), len(figures))
        for plot, (name, value) in zip(axes, figures, strict=True):
            _draw_kinds(plot, record, value)
            plot.set_ylabel(name)
        legend_beside(axes[0])
        _number_layers(axes[-1])
        return to_svg(figure, "Error of every layer by its number")


def plot_rates(record: CheckpointRecord) -> str:
    """The codebook of every layer: layer number by kind."""
    specs = record.checkpoint.config.codebooks
    used = {layer.info.codebook for layer in record.numbered}
    books = sorted(used, key=lambda id: (specs[id].bits, id))
    kinds = record.kinds
    with style():
        figure, (plot,) = new_figure(0.9 + 0.24 * len(kinds))
        for rank, book in enumerate(books):
            layers = [layer for layer in record.numbered if layer.info.codebook == book]
            plot.barh(
                [kinds.index(layer.kind) for layer in layers],
                0.9,
                left=[(layer.number or 0) - 0.45 for layer in layers],
                height=0.8,
                color=_blend(rank, len(books)),
                label=f"{book}: {specs[book].bits:g} bits",
            )
        plot.set_yticks(range(len(kinds)), kinds)
        plot.invert_yaxis()
        plot.grid(False)
        legend_beside(plot)
        _number_layers(plot)
        return to_svg(figure, "Codebook of every layer")


def plot_directions(record: CheckpointRecord) -> str:
    """What part of the weight error directions and magnitudes have, by layer number."""
    numbers = sorted({layer.number for layer in record.numbered if layer.number is not None})
    parts: list[tuple[str, Figures]] = [
        ("direction", lambda error: error.weight * error.direction),
        ("magnitude", lambda error: error.weight * (1 - error.direction)),
    ]
    with style():
        figure, (bars, lines) = new_figure(5.4, 2)
        bottom = [0.0] * len(numbers)
        for (name, value), colour, hatch in zip(parts, SERIES[1::4], ("", "////"), strict=False):
            heights = [
                _shown(mean([layer for layer in record.numbered if layer.number == number], value))
                for number in numbers
            ]
            bars.bar(
                numbers, heights, 0.8, bottom, color=colour, hatch=hatch, edgecolor=INK,
                linewidth=0.3, label=name,
            )  # fmt: skip
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        bars.set_ylabel("weight error")
        legend_beside(bars)
        _draw_kinds(lines, record, lambda error: error.direction)
        lines.set_ylabel("share of directions")
        lines.set_yscale("linear")
        lines.set_ylim(0, 1.02)
        lines.yaxis.set_major_formatter(PercentFormatter(1.0))
        legend_beside(lines)
        _number_layers(lines)
        return to_svg(figure, "Error due to directions and to magnitudes")


def plot_distortion(record: CheckpointRecord, codebooks: list[NamedCodebook]) -> str:
    """Distortion of codebooks over bits, and over the bound; and where the checkpoint lies."""
    star = record.checkpoint.bits_per_weight, _shown(record.weight_error or nan)
    with style():
        figure, (plot, ratios) = new_figure(5.6, 2)
        codecs = dict.fromkeys(book.codebook.spec.codec for book in codebooks)
        for codec, colour, marker in zip(codecs, SERIES, MARKERS, strict=False):
            points = [
                (book.codebook.spec.bits, book.distortion)
                for book in codebooks
                if book.codebook.spec.codec == codec
            ]
            _draw_distortions((plot, ratios), points, color=colour, marker=marker, label=codec)
        rates = [book.codebook.spec.bits for book in codebooks]
        ends = [min(rates) - 0.25, max(rates) + 0.25]
        bound = [(bits, 4.0**-bits) for bits in ends]
        _draw_distortions((plot, ratios), bound, color=INK, ls="--", label="least possible")
        _draw_distortions(
            (plot, ratios), [star], color=INK, marker="*", ms=12, ls="", label="this checkpoint"
        )
        plot.set_yscale("log")
        plot.set_ylabel("mean squared error / variance")
        legend_beside(plot)
        ratios.set_yscale("log")
        _label_values(ratios)
        ratios.set_ylabel("times the least possible")
        ratios.set_xlim(*ends)
        ratios.set_xlabel("bits per weight")
        return to_svg(figure, "Distortion of codebooks by bits per weight")


def _draw_distortions(
    plots: tuple[Axes, Axes], points: list[tuple[float, float]], **look: Any
) -> None:
    """Points (bits, distortion) in the first plot, in the second as multiples of the bound."""
    bits, distortions = zip(*points, strict=True)
    plots[0].plot(bits, distortions, **look)
    plots[1].plot(bits, [each * 4.0**rate for rate, each in points], **look)


def plot_perplexities(evaluations: Evaluations) -> str:
    """Perplexity over bits per weight; unquantized models as horizontal lines."""
    with style():
        figure, (plot,) = new_figure(3.8)
        for number, each in enumerate(evaluations.quantized):
            plot.errorbar(
                [each.bits or 0.0], [_shown(each.perplexity)], [max(0.0, each.stderr or 0.0)],
                color=SERIES[number % len(SERIES)], marker=MARKERS[number % len(MARKERS)],
                markersize=7, linestyle="", capsize=3, label=each.model,
            )  # fmt: skip
        for each in evaluations.references:
            height = _shown(each.perplexity)
            plot.axhline(height, color=INK, linestyle="--", linewidth=1, label=each.model)
        plot.margins(x=0.15, y=0.15)
        plot.set_xlabel("bits per weight")
        plot.set_ylabel("perplexity")
        plot.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
        return to_svg(figure, "Perplexity by bits per weight")


def _draw_kinds(plot: Axes, record: CheckpointRecord, value: Figures) -> None:
    """A line for each kind of layer; where a number has several of a kind, their mean."""
    for place, kind in enumerate(record.kinds):
        layers = [layer for layer in record.numbered if layer.kind == kind]
        numbers = sorted({layer.number for layer in layers if layer.number is not None})
        heights = [
            _shown(mean([layer for layer in layers if layer.number == number], value))
            for number in numbers
        ]
        colour = SERIES[place % len(SERIES)]
        marker = MARKERS[place % len(MARKERS)]
        plot.plot(numbers, heights, color=colour, marker=marker, label=kind)
    found = [x for layer in record.numbered if isfinite(x := _shown(value(layer.error)))]
    highest = max(found, default=0.0)
    if highest > LOG_RATIO * min(found, default=0.0) > 0:
        plot.set_yscale("log")
        _label_values(plot)
    elif highest > 0:
        plot.set_ylim(0, 1.1 * highest)


def _shown(value: float) -> float:
    """`value`, or NaN, which plots leave out, in the place of one that no axis could show."""
    return value if abs(value) < LARGEST else nan


def _label_values(plot: Axes) -> None:
    """Ticks at 1, 2 and 5 of every decade of a logarithmic axis."""
    plot.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    plot.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    plot.yaxis.set_minor_locator(NullLocator())


def _number_layers(plot: Axes) -> None:
    plot.margins(x=0.02)
    plot.set_xlabel("layer number")
    plot.xaxis.set_major_locator(MaxNLocator(integer=True))


def _blend(rank: int, count: int) -> str:
    """Colour of the `rank`-th lowest of `count` rates, on a map made for the colour-blind."""
    return to_hex(colormaps["cividis"](0.2 + 0.8 * rank / max(1, count - 1)))
