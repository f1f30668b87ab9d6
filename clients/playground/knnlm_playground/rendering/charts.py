"""A small chart as SVG, in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from knnlm_playground.rendering.parts import join, number

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 14, 44
_COLOURS = 6  # the style sheet has as many
_TICKS = 4


@dataclass(frozen=True, slots=True)
class Chart:
    """Points per series over x in per cent, y > 0 on a logarithmic scale, and levels that hold for every x.

    Attributes:
        series: name → (x, y, what is said of the point).
        levels: name → y.
    """

    title: str
    x_name: str
    y_name: str
    series: Mapping[str, Sequence[tuple[float, float, str]]]
    levels: Mapping[str, float]


def render_chart(chart: Chart) -> Markup:
    """The chart with its legend; everything in it is also said in words, for those who do not see it."""
    scale = _Scale.over([*chart.levels.values(), *(y for points in chart.series.values() for _, y, _ in points)])
    parts = [_axes(chart, scale)]
    for number_, (name, y) in enumerate(chart.levels.items()):
        parts.append(_level(name, scale.y(y), number_))
    for number_, points in enumerate(chart.series.values()):
        parts.append(_line(sorted(points), scale, number_ % _COLOURS))
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, chart.title, join(parts)
    )
    return Markup('<figure class="knnlm-chart"><figcaption>{}</figcaption>{}{}</figure>').format(
        chart.title, svg, _legend(chart)
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float  # logarithms
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> _Scale:
        logs = [math.log(value) for value in values] or [0.0]
        margin = 0.06 * (max(logs) - min(logs)) or 0.01
        return cls(min(logs) - margin, max(logs) + margin)

    def y(self, value: float) -> float:
        share = (math.log(value) - self.low) / (self.high - self.low)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    def ticks(self) -> list[float]:
        step = (self.high - self.low) / (_TICKS - 1)
        return [math.exp(self.low + i * step) for i in range(_TICKS)]


def _x(percent: float) -> float:
    return _LEFT + percent / 100 * (WIDTH - _LEFT - _RIGHT)


def _axes(chart: Chart, scale: _Scale) -> Markup:
    bottom = HEIGHT - _BOTTOM
    parts = [
        Markup('<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>').format(_LEFT, WIDTH - _RIGHT, y)
        + Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(_LEFT - 8, y + 4, number(tick, 4))
        for tick in scale.ticks()
        for y in (scale.y(tick),)
    ]
    parts += [
        Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(_x(percent), bottom + 18, percent)
        for percent in (0, 25, 50, 75, 100)
    ]
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(middle, HEIGHT - 6, chart.x_name)
    )
    upright = Markup('<text x="12" y="{0:.1f}" text-anchor="middle" transform="rotate(-90 12 {0:.1f})">{1}</text>')
    parts.append(upright.format((_TOP + bottom) / 2, chart.y_name))
    return join(parts)


def _level(name: str, y: float, number_: int) -> Markup:
    return Markup(
        '<line class="level level-{0}" x1="{1}" x2="{2}" y1="{3:.1f}" y2="{3:.1f}"><title>{4}</title></line>'
    ).format(number_ % 2, _LEFT, WIDTH - _RIGHT, y, name)


def _line(points: Sequence[tuple[float, float, str]], scale: _Scale, colour: int) -> Markup:
    places = [(_x(x), scale.y(y), words) for x, y, words in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
    dots = join(
        Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3.5"><title>{}</title></circle>').format(*place) for place in places
    )
    return Markup('<g class="series-{}"><polyline points="{}"/>{}</g>').format(colour, path, dots)


def _legend(chart: Chart) -> Markup:
    items = [
        Markup('<li><i class="level level-{}"></i>{} {}</li>').format(i % 2, name, number(y, 4))
        for i, (name, y) in enumerate(chart.levels.items())
    ]
    items += [
        Markup('<li><i class="series-{}"></i>{}</li>').format(i % _COLOURS, name) for i, name in enumerate(chart.series)
    ]
    return Markup('<ul class="knnlm-legend">{}</ul>').format(join(items))
