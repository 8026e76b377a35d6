"""Edge pictures, as T2I-Adapters and ControlNets for edges are given them."""

from __future__ import annotations

import numpy as np


def canny(picture: np.ndarray, low: float = 100.0, high: float = 200.0) -> np.ndarray:
    """Canny's edges without smoothing: ridges of the gradient above `high`, and above `low` where they touch such.

        g = |Sobel_x| + |Sobel_y| of the grey picture

    A pixel is on a ridge if no neighbour across the edge, in the one of four directions that is nearest to that of the
    gradient, has a larger g. Thresholds and gradient are those of OpenCV's Canny with its defaults, which the published
    models were trained with.

    Args:
        picture: (H, W, 3) RGB or (H, W) grey, 0..255.
        low, high: thresholds of g.

    Returns:
        (H, W) float32, 1 on edges, else 0.

    Source: Canny 1986, A Computational Approach to Edge Detection.
    """
    from scipy import ndimage

    grey = picture if picture.ndim == 2 else picture @ np.array([0.299, 0.587, 0.114])
    grey = np.rint(grey.astype(np.float64))
    across, down = (ndimage.sobel(grey, axis=axis, mode="nearest") for axis in (1, 0))
    g = np.abs(across) + np.abs(down)
    inside = np.pad(g, 1)

    def neighbour(rows: int, columns: int) -> np.ndarray:
        return inside[1 + rows : 1 + rows + g.shape[0], 1 + columns : 1 + columns + g.shape[1]]

    steep, flat = np.tan(np.pi / 8), np.tan(3 * np.pi / 8)
    horizontal = np.abs(down) < steep * np.abs(across)
    vertical = np.abs(down) > flat * np.abs(across)
    falling = (across * down >= 0) & ~horizontal & ~vertical  # the gradient points down and right, or up and left
    ridge = np.zeros(g.shape, bool)
    # Of equal neighbours one counts, else a step between two plateaus would have an edge two pixels wide.
    for where, (rows, columns) in (
        (horizontal, (0, 1)),
        (vertical, (1, 0)),
        (falling, (1, 1)),
        (~(horizontal | vertical | falling), (1, -1)),
    ):
        ridge |= where & (g > neighbour(-rows, -columns)) & (g >= neighbour(rows, columns))
    weak = ridge & (g > low)
    labels, _ = ndimage.label(weak, structure=np.ones((3, 3)))
    kept = np.unique(labels[weak & (g > high)])
    return (weak & np.isin(labels, kept)).astype(np.float32)
