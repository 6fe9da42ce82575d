"""One self-contained HTML page: text, tables and images in a single file that opens offline.

Every text is escaped, every image lies in the file as a data URI, and there is no script and no
address of anything outside. What a page says is its caller's matter.
"""

import base64
import io
import re
from html import escape
from pathlib import Path
from typing import Dict, Iterable, Sequence, Tuple, Union

import numpy as np
from PIL import Image

#: (H, W, 3) uint8 in RGB order, or the path of a PNG or JPEG file.
ImageLike = Union[np.ndarray, str, Path]

_MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
p { max-width: 45rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.85rem; }
th, td { padding: 0.25rem 0.5rem; border-bottom: 1px solid #e4e4e4; text-align: left;
         vertical-align: top; overflow-wrap: break-word; max-width: 28rem; }
th { border-bottom: 2px solid #999; white-space: nowrap; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: 0.85rem; max-width: 45rem; }
.gallery { display: flex; flex-wrap: wrap; gap: 0.75rem; }
.gallery figure { margin: 0; width: 10rem; }
.gallery img { width: 100%; height: 8rem; object-fit: contain; background: #f2f2f2; }
pre { background: #f6f6f6; padding: 0.75rem; overflow-x: auto; font-size: 0.8rem; }
summary { cursor: pointer; }
"""


class Page:
    """Collects the parts of a page in their order; `write` makes the file."""

    def __init__(self, title: str):
        """
        Args:
            title: the document's title and first heading.
        """
        self.title = title
        self._parts = []

    def heading(self, text: str, level: int = 2) -> None:
        """A heading; level 2 starts a section, 3 a part of one."""
        self._parts.append(f"<h{level:d}>{escape(text)}</h{level:d}>")

    def paragraph(self, text: str) -> None:
        self._parts.append(f"<p>{escape(text)}</p>")

    def table(self, header: Sequence, rows: Iterable[Sequence]) -> None:
        """A table of cells shown by `str`; columns of numbers are aligned to the right."""
        rows = [[str(cell) for cell in row] for row in rows]
        kinds = [' class="number"' if _is_numeric(column) else "" for column in zip(*rows)]
        kinds = kinds or [""] * len(header)
        body = "\n".join(_row("td", row, kinds) for row in rows)
        self._parts.append(
            f'<div class="table"><table><thead>{_row("th", map(str, header), kinds)}</thead>\n'
            f"<tbody>{body}</tbody></table></div>"
        )

    def image(self, image: ImageLike, caption: str = "") -> None:
        """One figure as wide as it is, at most as wide as the page."""
        self._parts.append(_figure(image, caption))

    def gallery(self, images: Iterable[Tuple[ImageLike, str]]) -> None:
        """Small figures (image, caption) side by side, in rows as wide as the window."""
        figures = "\n".join(_figure(image, caption) for image, caption in images)
        self._parts.append(f'<div class="gallery">{figures}</div>')

    def legend(self, colours: Dict[str, Sequence[int]]) -> None:
        """What the colours in pictures stand for: text -> RGB."""
        parts = (
            f'<span style="color: rgb{tuple(rgb)}">■</span> {escape(text)}'
            for text, rgb in colours.items()
        )
        self._parts.append(f"<p>{' &nbsp; '.join(parts)}</p>")

    def details(self, summary: str, text: str) -> None:
        """Preformatted text that is folded until the reader opens it."""
        self._parts.append(
            f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
        )

    def write(self, path: Union[str, Path]) -> Path:
        """Write the page; its folder is made. Returns the path."""
        title = escape(self.title)
        head = (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        )
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + "\n".join(self._parts) + "\n</body></html>\n", encoding="utf-8")
        return path


def data_uri(image: ImageLike) -> str:
    """The image as a data URI: a file as it is, an array as JPEG (quality 90).

    Raises:
        ValueError: a file that is neither PNG nor JPEG by its name, or an array of another shape
            or type.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"An image must be (H, W, 3) uint8; got {image.shape} {image.dtype}.")
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=90)
        mime, content = "image/jpeg", buffer.getvalue()
    else:
        suffix = Path(image).suffix.lower()
        if suffix not in _MIME:
            raise ValueError(f"{image} cannot be embedded: it must be one of {sorted(_MIME)}.")
        mime, content = _MIME[suffix], Path(image).read_bytes()
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def _figure(image: ImageLike, caption: str) -> str:
    text = escape(caption)
    return (
        f'<figure><img alt="{text}" src="{data_uri(image)}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _is_numeric(cells: Sequence[str]) -> bool:
    """Whether all cells that are not empty start as a number does, and there is one."""
    filled = [cell for cell in cells if cell]
    return bool(filled) and all(re.match(r"[-+−]?\d", cell) for cell in filled)


def _row(tag: str, cells: Iterable[str], kinds: Sequence[str]) -> str:
    shown = (f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds))
    return f"<tr>{''.join(shown)}</tr>"
