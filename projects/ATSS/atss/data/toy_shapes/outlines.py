"""Outlines of the toy shapes, one per class; the default set has the first six.

An outline is a closed polygon in the unit square (x right, y down) that touches all four sides, so
that scaling it to a box makes that box tight. A shape with a hole is one "keyhole" polygon: around
the outside, along a slit without width, around the hole in the other direction, and back. Its area
is correct, and its hole stays empty under the even-odd rule, which COCO masks and OpenCV follow.
"""

import numpy as np

CURVE_POINTS = 48  # points of a full ellipse; a multiple of four, so that it reaches all four sides
HOLE_WIDTH = 0.55  # of a ring or frame, as a fraction of its width


def _arc(start: float, stop: float, radius: float = 1.0, points: int = CURVE_POINTS) -> np.ndarray:
    """Points of a circle around (0, 0) between two angles in turns, both inclusive."""
    angles = 2 * np.pi * np.linspace(start, stop, points + 1)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _regular(corners: int, depth: float = 1.0) -> np.ndarray:
    """A regular polygon with a corner at the top; depth < 1 pulls its edges in and makes a star."""
    angles = np.pi * np.arange(2 * corners) / corners - np.pi / 2
    radii = np.where(np.arange(2 * corners) % 2 == 0, 1.0, depth * np.cos(np.pi / corners))
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _heart() -> np.ndarray:
    t = 2 * np.pi * np.arange(CURVE_POINTS) / CURVE_POINTS
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=1)


def _crescent() -> np.ndarray:
    # The outer circle from tip to tip, and back along a smaller circle to the right of it.
    inner = _arc(0.78, 0.22, radius=0.8)
    outer = _arc(0.15, 0.85)
    inner[:, 0] += outer[-1, 0] - inner[0, 0]
    inner[:, 1] *= outer[-1, 1] / inner[0, 1]
    return np.concatenate([outer, inner[1:-1]])


def _keyhole(outer: np.ndarray, hole: float) -> np.ndarray:
    """An outline around (0, 0) whose last point equals the first, with a hole of its shape."""
    return np.concatenate([outer, hole * outer[::-1]])


_SQUARE = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)], dtype=float)
_A, _B = 1 / 3, 2 / 3

_POINTS = {
    "rectangle": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "ellipse": _arc(0, 1)[:-1],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "rhombus": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "cross": [
        *[(_A, 0), (_B, 0), (_B, _A), (1, _A), (1, _B), (_B, _B)],
        *[(_B, 1), (_A, 1), (_A, _B), (0, _B), (0, _A), (_A, _A)],
    ],
    "ring": _keyhole(_arc(0, 1), HOLE_WIDTH),
    "star": _regular(5, depth=0.5),
    "arrow": [(0, 0.3), (0.5, 0.3), (0.5, 0), (1, 0.5), (0.5, 1), (0.5, 0.7), (0, 0.7)],
    "crescent": _crescent(),
    "corner": [(0, 0), (0.4, 0), (0.4, 0.6), (1, 0.6), (1, 1), (0, 1)],
    "tee": [(0, 0), (1, 0), (1, _A), (_B, _A), (_B, 1), (_A, 1), (_A, _A), (0, _A)],
    "heart": _heart(),
    "half_disc": _arc(0.5, 1, points=CURVE_POINTS // 2),
    "trapezoid": [(0.3, 0), (0.7, 0), (1, 1), (0, 1)],
    "frame": _keyhole(_SQUARE, HOLE_WIDTH),
    "hourglass": [(0, 0), (1, 0), (0.6, 0.5), (1, 1), (0, 1), (0.4, 0.5)],
    "chevron": [(0, 0), (0.5, 0), (1, 0.5), (0.5, 1), (0, 1), (0.5, 0.5)],
    "bolt": [(0.35, 0), (0.9, 0), (0.6, 0.38), (1, 0.38), (0.2, 1), (0.4, 0.55), (0, 0.55)],
    "pentagon": _regular(5),
    "hexagon": _regular(6),
}


def _to_unit_square(points: np.ndarray) -> np.ndarray:
    low = points.min(axis=0)
    return (points - low) / (points.max(axis=0) - low)


OUTLINES = {name: _to_unit_square(np.asarray(points, float)) for name, points in _POINTS.items()}
"""Shape name -> (corners, 2) x, y of its outline, in [0, 1], in the order of the class ids."""


def polygon_area(polygon: np.ndarray) -> float:
    """Area that a polygon encloses (shoelace formula), without the hole of a keyhole polygon.

    Args:
        polygon: (corners, 2) corners in order; the last one is joined to the first.

    Returns:
        The area, >= 0, in square units of the corners.

    Example:
        >>> polygon_area(np.array([(0, 0), (4, 0), (0, 2)]))
        4.0
    """
    x, y = polygon[:, 0], polygon[:, 1]
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)
