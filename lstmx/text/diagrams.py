"""The chapter's diagrams: nets as boxes, circles and arrows, drawn by code.

A rectangle is an input, a circle a layer's activations, a triangle an output. An arrow is a layer;
arrows of one colour are one layer, with one matrix of weights.
"""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon

Point = tuple[float, float]

INPUT, HIDDEN, OUTPUT = "#2a9d8f", "#e76f51", "#264653"  # the layers' colours
UPPER = "#b5838d"  # between the layers of a deep net
FACES = {"input": "#e3f4f1", "hidden": "#fdf0ec", "output": "#e8eef1"}
GAP = 0.36  # from a node's centre to its rim


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure whose unit is about an inch."""
    figure, axis = plt.subplots(figsize=(width, height))
    axis.set_xlim(0, width)
    axis.set_ylim(0, height)
    axis.set_aspect("equal")
    axis.axis("off")
    return figure, axis


def _node(axis: Axes, at: Point, kind: str, text: str = "") -> None:
    x, y = at
    look: dict[str, Any] = {
        "facecolor": FACES[kind],
        "edgecolor": "#444444",
        "linewidth": 1.2,
        "zorder": 2,
    }
    if kind == "input":
        box = (x - GAP + 0.06, y - GAP / 2)
        size = (2 * GAP - 0.12, GAP)
        axis.add_patch(FancyBboxPatch(box, *size, boxstyle="round,pad=0.06", **look))
    elif kind == "hidden":
        axis.add_patch(Circle(at, GAP, **look))
    else:
        corners = [(x - 1.4 * GAP, y + GAP), (x + 1.4 * GAP, y + GAP), (x, y - GAP)]
        axis.add_patch(Polygon(corners, **look))
    axis.text(x, y + (0.14 if kind == "output" else 0), text, ha="center", va="center", fontsize=8)


def _arrow(
    axis: Axes, start: Point, end: Point, color: str, *, bend: float = 0.0, gap: float = GAP + 0.06
) -> None:
    """From rim to rim of two nodes."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = (dx * dx + dy * dy) ** 0.5
    ux, uy = dx / length * gap, dy / length * gap
    axis.add_patch(
        FancyArrowPatch(
            (start[0] + ux, start[1] + uy),
            (end[0] - ux, end[1] - uy),
            arrowstyle="-|>",
            mutation_scale=13,
            linewidth=1.8,
            color=color,
            connectionstyle=f"arc3,rad={bend}",
            zorder=1,
        )
    )


def _loop(axis: Axes, at: Point, color: str) -> None:
    """From a node to itself."""
    x, y = at
    axis.add_patch(
        FancyArrowPatch(
            (x + 0.30, y + 0.22),
            (x - 0.30, y + 0.22),
            arrowstyle="-|>",
            mutation_scale=13,
            linewidth=1.8,
            color=color,
            connectionstyle="arc3,rad=1.5",
            zorder=1,
        )
    )


def _key(axis: Axes, at: Point, entries: list[tuple[str, str]]) -> None:
    x, y = at
    for row, (color, text) in enumerate(entries):
        level = y - 0.28 * row
        axis.plot([x, x + 0.4], [level, level], color=color, linewidth=2)
        axis.text(x + 0.5, level, text, va="center", fontsize=8)


LAYERS = [
    (INPUT, "input to hidden: the embedding"),
    (HIDDEN, "hidden to hidden"),
    (OUTPUT, "hidden to output"),
]


def flow_chart() -> Figure:
    """LMModel1: three words enter one after another, the fourth is predicted."""
    figure, axis = _canvas(7.4, 3.6)
    hidden = [(1.0 + 1.7 * i, 1.9) for i in range(3)]
    for i, at in enumerate(hidden):
        word = (at[0], 0.7)
        _node(axis, word, "input", f"word {i + 1}")
        _node(axis, at, "hidden", f"$h_{i + 1}$")
        _arrow(axis, word, at, INPUT)
        if i > 0:
            _arrow(axis, hidden[i - 1], at, HIDDEN)
    out = (6.1, 1.9)
    _node(axis, out, "output", "word 4")
    _arrow(axis, hidden[-1], out, OUTPUT)
    _key(axis, (0.7, 3.35), LAYERS)
    return figure


def loop() -> Figure:
    """LMModel2: the same net, written as a loop."""
    figure, axis = _canvas(5.4, 3.6)
    word, h, out = (1.0, 0.7), (1.0, 1.9), (2.9, 1.9)
    _node(axis, word, "input", "word i")
    _node(axis, h, "hidden", "h")
    _node(axis, out, "output", "next\nword")
    _arrow(axis, word, h, INPUT)
    _arrow(axis, h, out, OUTPUT)
    _loop(axis, h, HIDDEN)
    axis.text(1.0, 2.98, "for i = 1, 2, 3", ha="center", fontsize=8, color=HIDDEN)
    _key(axis, (2.4, 3.35), LAYERS)
    return figure


def multilayer() -> Figure:
    """LMModel5: the output of one recurrent layer is the input of the next."""
    figure, axis = _canvas(5.4, 4.9)
    word, first, second, out = (1.0, 0.6), (1.0, 1.8), (1.0, 3.4), (2.9, 3.4)
    _node(axis, word, "input", "word i")
    _node(axis, first, "hidden", "$h^1$")
    _node(axis, second, "hidden", "$h^2$")
    _node(axis, out, "output", "word\ni+1")
    _arrow(axis, word, first, INPUT)
    _arrow(axis, first, second, UPPER)
    _arrow(axis, second, out, OUTPUT)
    # The loop of the lower layer would meet the arrow above it: it goes round the side.
    for x, y in (first, second):
        axis.add_patch(
            FancyArrowPatch(
                (x - 0.22, y + 0.30),
                (x - 0.22, y - 0.30),
                arrowstyle="-|>",
                mutation_scale=13,
                linewidth=1.8,
                color=HIDDEN,
                connectionstyle="arc3,rad=1.5",
                zorder=1,
            )
        )
    entries = [LAYERS[0], (HIDDEN, "hidden to hidden, one for each layer")]
    _key(axis, (2.0, 4.65), [*entries, (UPPER, "layer 1 to layer 2"), LAYERS[2]])
    return figure


def unrolled_multilayer() -> Figure:
    """The multilayer net, one column for each word: every step predicts."""
    figure, axis = _canvas(8.0, 5.9)
    columns = [1.0 + 1.8 * i for i in range(4)]
    for i, x in enumerate(columns):
        word, first, second, out = (x, 0.6), (x, 1.8), (x, 3.1), (x, 4.3)
        _node(axis, word, "input", f"word {i + 1}")
        _node(axis, first, "hidden", f"$h^1_{i + 1}$")
        _node(axis, second, "hidden", f"$h^2_{i + 1}$")
        _node(axis, out, "output", f"word {i + 2}")
        _arrow(axis, word, first, INPUT)
        _arrow(axis, first, second, UPPER)
        _arrow(axis, second, out, OUTPUT)
        if i > 0:
            _arrow(axis, (columns[i - 1], 1.8), first, HIDDEN)
            _arrow(axis, (columns[i - 1], 3.1), second, HIDDEN)
    for y in (1.8, 3.1):
        _arrow(axis, (columns[-1], y), (columns[-1] + 1.2, y), HIDDEN)
    _key(axis, (0.8, 5.65), [LAYERS[0], (HIDDEN, "hidden to hidden, one for each layer")])
    _key(axis, (4.6, 5.65), [(UPPER, "layer 1 to layer 2"), LAYERS[2]])
    return figure


def lstm_cell() -> Figure:
    """An LSTM cell: the upper line is the cell state, the lower one the hidden state."""
    figure, axis = _canvas(8.6, 4.7)
    axis.add_patch(
        FancyBboxPatch((1.2, 0.8), 6.2, 3.2, boxstyle="round,pad=0.15", facecolor="#fafafa",
                       edgecolor="#999999", zorder=0)
    )  # fmt: skip
    line: dict[str, Any] = {"color": "#444444", "linewidth": 1.6, "zorder": 1}
    top, bottom = 3.5, 1.2
    gates = {"f": 2.0, "i": 3.2, "g": 4.3, "o": 5.4}

    def arrow(start: Point, end: Point) -> None:
        axis.annotate(
            "", end, start, arrowprops={"arrowstyle": "-|>", **line, "shrinkA": 0, "shrinkB": 0}
        )

    def operation(at: Point, text: str) -> None:
        axis.add_patch(Circle(at, 0.17, facecolor=FACES["output"], edgecolor="#444444", zorder=3))
        axis.text(*at, text, ha="center", va="center", fontsize=10, zorder=4)

    def box(at: Point, text: str, color: str) -> None:
        x, y = at
        axis.add_patch(
            FancyBboxPatch((x - 0.32, y - 0.17), 0.64, 0.34, boxstyle="round,pad=0.04",
                           facecolor=color, edgecolor="#444444", zorder=3)
        )  # fmt: skip
        axis.text(x, y, text, ha="center", va="center", fontsize=10, zorder=4)

    # The cell state, from left to right.
    arrow((0.5, top), (1.83, top))
    arrow((2.17, top), (3.58, top))
    arrow((3.92, top), (8.1, top))
    operation((2.0, top), "×")
    operation((3.75, top), "+")
    # The hidden state and the input, joined below the gates.
    axis.plot([0.5, 5.4], [bottom, bottom], **line)
    axis.plot([1.0, 1.0, 1.3], [0.3, bottom - 0.2, bottom], **line)
    for name, x in gates.items():
        arrow((x, bottom), (x, 1.62))
        box((x, 1.85), "tanh" if name == "g" else "σ", "#fdf0ec" if name == "g" else "#e3f4f1")
        axis.text(x + 0.12, 2.18, f"${name}$", fontsize=9)
    arrow((2.0, 2.06), (2.0, top - 0.17))
    # Input gate times new cell content, added to the cell state.
    operation((3.75, 2.75), "×")
    axis.plot([3.2, 3.2], [2.06, 2.75], **line)
    arrow((3.2, 2.75), (3.58, 2.75))
    axis.plot([4.3, 4.3], [2.06, 2.75], **line)
    arrow((4.3, 2.75), (3.92, 2.75))
    arrow((3.75, 2.92), (3.75, top - 0.17))
    # Output gate times tanh of the cell state.
    box((6.6, 2.85), "tanh", "#fdf0ec")
    arrow((6.6, top), (6.6, 3.08))
    operation((6.6, 2.0), "×")
    arrow((6.6, 2.62), (6.6, 2.17))
    axis.plot([5.4, 5.4], [2.06, 2.45], **line)
    axis.plot([5.4, 5.9, 5.9], [2.45, 2.45, 2.0], **line)
    arrow((5.9, 2.0), (6.43, 2.0))
    axis.plot([6.6, 6.6], [1.83, bottom], **line)
    arrow((6.6, bottom), (8.1, bottom))
    arrow((7.15, bottom), (7.15, 4.5))
    labels = [
        (0.4, top, "$c_{t-1}$", "right"), (8.2, top, "$c_t$", "left"),
        (0.4, bottom, "$h_{t-1}$", "right"), (8.2, bottom, "$h_t$", "left"),
        (1.0, 0.12, "$x_t$", "center"), (7.15, 4.62, "$h_t$", "center"),
    ]  # fmt: skip
    for x, y, text, side in labels:
        axis.text(x, y, text, ha=side, va="center", fontsize=11)
    return figure


DIAGRAMS = {
    "flow-chart": flow_chart,
    "loop": loop,
    "multilayer": multilayer,
    "multilayer-unrolled": unrolled_multilayer,
    "lstm-cell": lstm_cell,
}
