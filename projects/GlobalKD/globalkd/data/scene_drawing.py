"""Draws the parts of a digit scene: backgrounds, handwritten digits, bars that cover them.

Pure functions of a numpy generator and arrays. Not here: what a scene holds and where, and the
files (`digit_scenes.py`). Images are (S, S, 3) float32 RGB in [0, 1], S pixels a side; `alpha` is a
float32 opacity in [0, 1].
"""

from typing import Tuple

import cv2
import numpy as np

LUMINANCE = np.array([0.299, 0.587, 0.114])
MIN_CONTRAST = 0.4
# Opacity below which a pixel is no ink: what is drawn and what a box encloses are the same pixels.
INK = 0.2


def draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A darkish gradient with one of three textures (noise, stripes, checks) and fine grain.

    Args:
        rng: source of every random choice.
        size: side S in pixels.

    Returns:
        (S, S, 3) float32 RGB in [0, 1].
    """
    start = rng.uniform(0.0, 0.5, 3)
    end = start + rng.uniform(-0.2, 0.2, 3)
    ramp = _ramp(rng, size)[..., None]
    image = start * (1 - ramp) + end * ramp
    texture = (_noise, _stripes, _checks)[rng.integers(3)](rng, size)[..., None]
    image += rng.uniform(0.03, 0.1) * texture * rng.uniform(0.3, 1.0, 3)
    image += rng.normal(0, 0.012, (size, size, 1))
    return np.clip(image, 0, 1).astype(np.float32)


def _ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    """(S, S) values rising from 0 to 1 along a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size] / size
    ramp = x * np.cos(angle) + y * np.sin(angle)
    return (ramp - ramp.min()) / (ramp.max() - ramp.min())


def _noise(rng: np.random.Generator, size: int) -> np.ndarray:
    total = np.zeros((size, size), np.float32)
    for cells, weight in ((4, 0.6), (9, 0.4), (20, 0.3)):
        grid = rng.normal(0, 1, (cells, cells)).astype(np.float32)
        total += weight * cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
    return total


def _stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.sin(_ramp(rng, size) * 2 * np.pi * rng.uniform(4, 16))


def _checks(rng: np.random.Generator, size: int) -> np.ndarray:
    period = rng.integers(size // 16, size // 5)
    y, x = np.mgrid[:size, :size] // period
    return (x + y) % 2 * 2.0 - 1.0


def draw_digit(sample: np.ndarray, height: float, angle: float, shear: float) -> np.ndarray:
    """Enlarge a small scan of a digit to a smooth, turned and slanted stroke.

    Args:
        sample: (8, 8) array in [0, 1].
        height: side of the scan after enlargement, in pixels.
        angle: rotation in radians.
        shear: horizontal slant, dx per dy.

    Returns:
        (H, W) alpha cropped to its ink: every border row and column holds ink, and a pixel that is
        no ink is 0.
    """
    canvas = int(np.ceil(height * 1.8))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = height / 8 * turn @ np.array([[1.0, shear], [0.0, 1.0]])
    offset = (canvas - 1) / 2 - matrix @ np.array([3.5, 3.5])
    enlarged = cv2.warpAffine(
        sample.astype(np.float32),
        np.column_stack([matrix, offset]),
        (canvas, canvas),
        flags=cv2.INTER_CUBIC,
    )
    alpha = np.clip((enlarged - 0.3) / 0.4, 0, 1)
    alpha[alpha < INK] = 0
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def pick_colour(rng: np.random.Generator, backdrop: np.ndarray) -> np.ndarray:
    """A random colour lighter than a patch.

    Args:
        rng: source of randomness.
        backdrop: (..., 3) pixels that the colour is to stand on.

    Returns:
        (3,) RGB. Its luminance is MIN_CONTRAST above the patch's mean, or where none of 16
        colours is light enough, that of the lightest.
    """
    mean = (backdrop.reshape(-1, 3).mean(0) * LUMINANCE).sum()
    candidates = rng.random((16, 3))
    contrast = (candidates * LUMINANCE).sum(1) - mean
    return candidates[np.argmax(np.minimum(contrast, MIN_CONTRAST))]


def bar_over(rng: np.random.Generator, alpha: np.ndarray, share: float, reach: int) -> np.ndarray:
    """A straight bar that covers a given share of the ink, somewhere in its middle.

    Args:
        rng: source of randomness.
        alpha: (S, S) opacity of one digit in the scene.
        share: share of the inked pixels to cover, in (0, 0.7].
        reach: pixels by which the bar's ends may leave the digit's box.

    Returns:
        (S, S) bool.
    """
    rows, columns = np.nonzero(alpha)
    angle = rng.uniform(0, np.pi)
    y, x = np.mgrid[: len(alpha), : len(alpha)]
    across = x * np.cos(angle) + y * np.sin(angle)
    first = rng.uniform(0.15, 0.85 - share)
    low, high = np.quantile(across[rows, columns], [first, first + share])
    near = (y >= rows.min() - reach) & (y <= rows.max() + reach)
    near &= (x >= columns.min() - reach) & (x <= columns.max() + reach)
    return near & (across >= low) & (across <= high)


def paste(image: np.ndarray, alpha: np.ndarray, colour: np.ndarray) -> None:
    """Blend `colour` into an (S, S, 3) image, in place, with (S, S) opacity `alpha`."""
    image += alpha[..., None] * (colour.astype(np.float32) - image)


def blur(alpha: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of an (S, S) opacity; `sigma` in pixels."""
    return cv2.GaussianBlur(alpha, (0, 0), sigma, borderType=cv2.BORDER_CONSTANT)


def encode_png(image: np.ndarray) -> bytes:
    """An (S, S, 3) RGB image in [0, 1] as the bytes of a PNG file."""
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return cv2.imencode(".png", pixels[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 3])[1].tobytes()


def ink_box(alpha: np.ndarray) -> Tuple[int, int, int, int]:
    """(x, y, width, height) of the smallest box around every pixel above 0."""
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    width, height = columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1
    return int(columns[0]), int(rows[0]), int(width), int(height)
