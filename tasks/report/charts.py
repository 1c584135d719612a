"""What a page can show: numbers as text, curves as SVG coordinates, stored pictures as data URIs.

Knows nothing of cycles, judges or HTML. Markup and colours are the template's, so that one drawing serves a light
and a dark page.
"""

import base64
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

LEFT, RIGHT, TOP, BOTTOM = 50.0, 440.0, 10.0, 176.0
"""Edges of a panel's plotting area within the 460 x 200 units of its SVG."""
MOST_POINTS = 400
"""More points than that look the same and only make the page heavier."""
Tick = tuple[float, str]
"""Where on the axis, and its label."""


@dataclass(frozen=True)
class Line:
    """One quantity over the steps. dots: SVG path of the single steps. mean: SVG points of their running mean."""

    name: str
    dots: str
    mean: str


@dataclass(frozen=True)
class Panel:
    """One drawing. level: a line to compare with, where it lies within sight."""

    title: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    level: Tick | None


def panel(title: str, series: Mapping[str, np.ndarray], level: tuple[float, str] | None) -> Panel:
    """Curves of equal length over the steps 1, 2, ...: single steps, and a running mean over a tenth of them."""
    steps = len(next(iter(series.values())))
    low, high, visible = _frame(series, level[0] if level else None)
    return Panel(
        title,
        [Line(name, *_draw(values, low, high)) for name, values in series.items()],
        [(float(_x(tick - 1, steps)), f"{tick:g}") for tick in _ticks(1, max(steps, 2), whole=True)],
        [(float(_y(tick, low, high)), f"{tick:.4g}") for tick in _ticks(low, high)],
        (float(_y(level[0], low, high)), level[1]) if level and visible else None,
    )


QUARTERS = ("cleanest", "second", "third", "noisiest")


def training_panels(values: dict[str, np.ndarray], max_grad_norm: float, start: float | None) -> dict[str, Panel]:
    """The training curves by the name under which the template explains them: those of which there are numbers.

    start: the loss of an untrained policy, None where there is no such number.
    """
    above, errors, accuracy = (
        {label: values[name] for label, name in names.items() if name in values}
        for names in (
            {"winner": "winner_error_delta", "loser": "loser_error_delta"},
            {"winner": "winner_error", "loser": "loser_error"},
            {"accuracy": "implicit_accuracy", "held-out pairs": "heldout_implicit_accuracy"},
        )
    )
    quartiles = {f"{label} quarter": f"winner_error_delta_q{index}" for index, label in enumerate(QUARTERS, 1)}
    by_noise = {label: values[name] for label, name in quartiles.items() if name in values}
    level = None if start is None else (start, f"{start:.3g} at the start")
    panels = {"loss": panel("Loss", {"loss": values["loss"]}, level)}
    if accuracy:
        panels["accuracy"] = panel("Implicit accuracy", accuracy, (0.5, "chance"))
    if above:
        panels["above"] = panel("Error above the reference", above, (0.0, "as the reference"))
    if by_noise:
        panels["noise"] = panel("Winner's error above the reference, by noise", by_noise, (0.0, "as the reference"))
    if errors:
        panels["errors"] = panel("Error", errors, None)
    panels["gradient"] = panel("Gradient norm", {"norm": values["grad_norm"]}, (max_grad_norm, "clipped above"))
    return panels


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` <= n steps around each step; over fewer at both ends. Shape (n,)."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _smooth(values: np.ndarray) -> np.ndarray:
    return running_mean(values, max(1, len(values) // 10))


def _frame(series: Mapping[str, np.ndarray], level: float | None) -> tuple[float, float, bool]:
    """(low, high, is the level within): all running means and 98 % of the single steps.

    The level widens the frame unless it is further away than the data are wide: it would flatten the curve.
    """
    parts = [part for v in series.values() for part in (np.percentile(v, [1, 99]), _smooth(v))]
    low, high = float(np.concatenate(parts).min()), float(np.concatenate(parts).max())
    span = (high - low) or abs(high) or 1.0
    visible = level is not None and low - span <= level <= high + span
    if level is not None and visible:
        low, high = min(low, level), max(high, level)
    return low - 0.06 * span, high + 0.06 * span, visible


def _draw(values: np.ndarray, low: float, high: float) -> tuple[str, str]:
    """(path of dots, points of the running mean); dots outside the frame are left out."""
    at = np.unique(np.linspace(0, len(values) - 1, min(len(values), MOST_POINTS)).round().astype(int))
    x = _x(at, len(values))
    dots = "".join(
        f"M{a:.1f} {b:.1f}h0" for a, b in zip(x, _y(values[at], low, high), strict=True) if TOP <= b <= BOTTOM
    )
    mean = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, _y(_smooth(values)[at], low, high), strict=True))
    return dots, mean


def _x(index: np.ndarray | float, steps: int) -> np.ndarray:
    return LEFT + (RIGHT - LEFT) * np.asarray(index) / max(1, steps - 1)


def _y(value: np.ndarray | float, low: float, high: float) -> np.ndarray:
    return BOTTOM - (BOTTOM - TOP) * (np.asarray(value) - low) / (high - low)


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """At most six round numbers within [low, high]: the multiples of 1, 2 or 5 times a power of ten. low < high."""
    rough = (high - low) / 5
    magnitude = 10.0 ** np.floor(np.log10(rough))
    step = magnitude * next(factor for factor in (1, 2, 5, 10) if factor * magnitude >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return [float(tick * step) + 0.0 for tick in np.arange(first, last + 1)]


@dataclass(frozen=True)
class Scale:
    """An axis of win rates with 0.5 in the middle."""

    half: float
    """Distance of both ends from 0.5."""

    @classmethod
    def around(cls, rates: Iterable[float]) -> "Scale":
        """The narrowest scale in steps of 0.05, at least 0.4 to 0.6, that holds all rates."""
        furthest = max((abs(rate - 0.5) for rate in rates), default=0.0)
        return cls(min(0.5, max(0.1, 0.05 * np.ceil(round(furthest / 0.05, 6)))))

    def percent(self, rate: float) -> float:
        """Position on the axis: 0 at its left end, 100 at its right end."""
        return round(100 * (rate - 0.5 + self.half) / (2 * self.half), 2)


@dataclass(frozen=True)
class Picture:
    """uri: the picture itself. tiny: so few pixels that they are to be shown as squares."""

    uri: str
    tiny: bool


def picture(data: bytes, side: int = 256) -> Picture:
    """A stored picture to put into a page: as it is up to `side` pixels, else scaled down to a JPEG."""
    with Image.open(io.BytesIO(data)) as image:
        tiny = max(image.size) < 128
        if max(image.size) <= side and image.format in ("PNG", "JPEG"):
            return Picture(data_uri(data, image.format), tiny)
        small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return Picture(_encoded(small, "JPEG"), tiny)


def thumbnail_uri(data: bytes, side: int) -> str:
    """A picture close to `side` pixels for places that cannot scale it: tiny ones are enlarged by a whole factor."""
    with Image.open(io.BytesIO(data)) as image:
        factor = side // max(image.size)
        if factor < 2:
            return picture(data, side).uri
        size = (factor * image.width, factor * image.height)
        return _encoded(image.convert("RGB").resize(size, Image.Resampling.NEAREST), "PNG")


def _encoded(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    options = {"quality": 85} if kind == "JPEG" else {"optimize": True}
    image.save(buffer, format=kind, **options)
    return data_uri(buffer.getvalue(), kind)


def data_uri(data: bytes, kind: str) -> str:
    """An encoded picture as a URI; kind: "PNG" or "JPEG"."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"


def number(value: float) -> str:
    return f"{value:.4g}"


def signed(value: float) -> str:
    return f"{value:+.3g}"


def p_text(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.2g}"


def markdown(text: str) -> str:
    """Foreign text as one line in a markdown table: nothing in it is taken for markup."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", " ".join(text.split()))
