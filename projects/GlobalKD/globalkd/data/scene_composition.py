"""Decides what a digit scene holds and where: digits, their places, what makes them ambiguous.

Here: one scene from one random generator. Not here: how things are drawn (`scene_drawing.py`) and
the files (`digit_scenes.py`). S: side of a scene in pixels. Lengths are given for S = 128 and grow
with S.
"""

from dataclasses import dataclass, field
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from .scene_drawing import (
    bar_over,
    blur,
    draw_background,
    draw_digit,
    ink_box,
    paste,
    pick_colour,
)

CLEAN = "none"
AMBIGUITY_KINDS = ("blur", "tiny", "faint", "overlap")
LEAST_AMBIGUITY = 0.3
MIN_SIDE, MAX_SIDE = 18.0, 56.0
PLACING_TRIES = 40
PAIR_SHARE = 0.6
LEAST_COVER = 0.08


@dataclass
class Digit:
    """One digit of a scene.

    Attributes:
        label: 0 to 9.
        sample: row in scikit-learn's dataset.
        side: height of the enlarged scan, in pixels.
        alpha: (S, S) opacity of the digit as written: before blur, fading or cover.
        kind: CLEAN or one of AMBIGUITY_KINDS.
        ambiguity: 0 for a clean digit, else in (0, 1].
        barred: whether a bar covers a part of it.
    """

    label: int
    sample: int
    side: float
    alpha: np.ndarray = field(repr=False)
    kind: str = CLEAN
    ambiguity: float = 0.0
    barred: bool = False

    def as_annotation(self) -> Dict:
        """COCO fields. The box is tight around the ink, also where something covers it."""
        x, y, width, height = ink_box(self.alpha)
        return {
            "category_id": self.label + 1,
            "bbox": [x, y, width, height],
            "area": width * height,
            "iscrowd": 0,
            "ambiguity": self.ambiguity,
            "ambiguity_kind": self.kind,
            "sample": self.sample,
        }


class SceneComposer:
    """Makes scenes: call it with a generator, get an image and its digits.

    Args:
        scans: (N, 8, 8) handwritten digits in [0, 1].
        labels: (N,) their classes, 0 to 9.
        samples: the rows of `scans` that may be used.
        size: side S of a scene in pixels.
        ambiguous_share: expected share of ambiguous digits, in [0, 1].
        digits_per_scene: fewest and most digits. A digit that finds no free place is left out.
    """

    def __init__(
        self,
        *,
        scans: np.ndarray,
        labels: np.ndarray,
        samples: np.ndarray,
        size: int,
        ambiguous_share: float,
        digits_per_scene: Sequence[int],
    ):
        self.scans, self.labels, self.samples = scans, labels, samples
        self.size = size
        self.ambiguous_share = ambiguous_share
        self.digits_per_scene = digits_per_scene

    def __call__(self, rng: np.random.Generator) -> Tuple[np.ndarray, List[Digit]]:
        """Compose one scene.

        Returns:
            (S, S, 3) float32 RGB in [0, 1], and the digits in the order of painting.
        """
        image = draw_background(rng, self.size)
        digits = self._arrange(rng)
        for digit in digits:
            _paint(rng, image, digit)
        return image, digits

    def _arrange(self, rng) -> List[Digit]:
        digits, taken = [], []
        count = rng.integers(*self.digits_per_scene, endpoint=True)
        for kind in draw_kinds(rng, count, self.ambiguous_share):
            digit = None
            if kind == "overlap" and digits and digits[-1].barred:
                digit = self._place_on_last(rng, digits[-1], taken)
            digit = digit or self._place(rng, kind, taken)
            if digit:
                digits.append(digit)
        return digits

    def _place(self, rng, kind: str, taken: List) -> Optional[Digit]:
        """A digit on free ground, smaller if need be; None where not even the smallest fits."""
        ambiguity = 0.0 if kind == CLEAN else round(rng.uniform(LEAST_AMBIGUITY, 1), 3)
        sample, unit = rng.choice(self.samples), self.size / 128
        side, smallest = rng.uniform(MIN_SIDE, MAX_SIDE) * unit, MIN_SIDE * unit
        if kind == "tiny":
            side = smallest = (17 - 6 * ambiguity) * unit
        while side >= smallest:
            glyph = self._write(rng, sample, side)
            for _ in range(PLACING_TRIES):
                corner = [int(rng.integers(1, self.size - n)) for n in glyph.shape]
                if _claim(corner, glyph.shape, _margin(kind, side), taken):
                    digit = self._digit(sample, side, glyph, corner)
                    digit.kind, digit.ambiguity, digit.barred = kind, ambiguity, kind == "overlap"
                    return digit
            side *= 0.85
        return None

    def _place_on_last(self, rng, below: Digit, taken: List) -> Optional[Digit]:
        """A digit that hides a part of `below`, the last one placed; None where none fits."""
        sample, side = rng.choice(self.samples), below.side * rng.uniform(0.85, 1.15)
        glyph = self._write(rng, sample, side)
        x, y, width, height = ink_box(below.alpha)
        for _ in range(PLACING_TRIES):
            angle, shift = rng.uniform(0, 2 * np.pi), (0.75 - 0.35 * below.ambiguity) * side
            centre = y + height / 2 + shift * np.sin(angle), x + width / 2 + shift * np.cos(angle)
            corner = [round(c - n / 2) for c, n in zip(centre, glyph.shape)]
            if any(c < 1 or c + n >= self.size for c, n in zip(corner, glyph.shape)):
                continue
            digit = self._digit(sample, side, glyph, corner)
            hidden = (digit.alpha > 0)[below.alpha > 0].mean()
            others = taken[:-1]
            if hidden < LEAST_COVER or not _claim(corner, glyph.shape, 2, others):
                continue
            taken.append(others[-1])
            digit.kind, digit.ambiguity = "overlap", round(below.ambiguity / 2, 3)
            below.barred = False
            return digit
        return None

    def _write(self, rng, sample: int, side: float) -> np.ndarray:
        return draw_digit(self.scans[sample], side, *rng.uniform(-0.12, 0.12, 2))

    def _digit(self, sample: int, side: float, glyph: np.ndarray, corner: List[int]) -> Digit:
        alpha = np.zeros((self.size, self.size), np.float32)
        (top, left), (height, width) = corner, glyph.shape
        alpha[top : top + height, left : left + width] = glyph
        return Digit(label=int(self.labels[sample]), sample=int(sample), side=side, alpha=alpha)


def draw_kinds(rng: np.random.Generator, count: int, ambiguous_share: float) -> List[str]:
    """Kinds of a scene's digits: on average `ambiguous_share` of them not CLEAN.

    Two "overlap" in a row mean that the second digit is put on the first.
    """
    ambiguous = int(count * ambiguous_share + rng.random())
    kinds = []
    while len(kinds) < ambiguous:
        kind = AMBIGUITY_KINDS[rng.integers(len(AMBIGUITY_KINDS))]
        pair = kind == "overlap" and len(kinds) + 1 < ambiguous and rng.random() < PAIR_SHARE
        kinds += [kind] * (2 if pair else 1)
    return kinds + [CLEAN] * (int(count) - ambiguous)


def _margin(kind: str, side: float) -> int:
    """Free pixels around a box: room for a soft edge or for the ends of a bar."""
    return int(0.2 * side) + 2 if kind in ("blur", "overlap") else 2


def _claim(corner: Sequence[int], shape: Sequence[int], margin: int, taken: List) -> bool:
    """Add the box with its margin to `taken` unless it meets one of those; True where added."""
    (top, left), (height, width) = corner, shape
    box = (left - margin, top - margin, left + width + margin, top + height + margin)
    for other in taken:
        if min(box[2], other[2]) > max(box[0], other[0]) and min(box[3], other[3]) > max(
            box[1], other[1]
        ):
            return False
    taken.append(box)
    return True


def _paint(rng: np.random.Generator, image: np.ndarray, digit: Digit) -> None:
    """Draw one digit into `image`, in place, with what makes it ambiguous."""
    x, y, width, height = ink_box(digit.alpha)
    colour = pick_colour(rng, image[y : y + height, x : x + width])
    opacity, alpha = rng.uniform(0.85, 1.0), digit.alpha
    if digit.kind == "faint":
        opacity = 0.55 - 0.4 * digit.ambiguity
    if digit.kind == "blur":
        alpha = blur(alpha, (0.03 + 0.06 * digit.ambiguity) * digit.side)
    paste(image, opacity * alpha, colour)
    if digit.barred:
        share, reach = 0.15 + 0.3 * digit.ambiguity, int(0.15 * digit.side)
        paste(image, bar_over(rng, digit.alpha, share, reach), rng.random(3))
