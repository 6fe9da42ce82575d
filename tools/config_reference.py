#!/usr/bin/env python
"""Write the configuration reference, docs/config.md, from the comments of config.py.

    python tools/config_reference.py docs/config.md           writes the page
    python tools/config_reference.py --check docs/config.md   fails if the page is out of date

The source is parsed, not run. Understood, from `add_globalkd_config(cfg)` on: assignments to
attributes of a config node (`node.GLOBAL.WEIGHT = 5.0`), new nodes (`node.GLOBAL = CN()`), other
names for a node (`node = cfg.MODEL.GLOBALKD`) and calls of functions in the same file that are
given a node. The comment lines directly above an assignment are its text.
"""

import argparse
import ast
import io
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "projects" / "GlobalKD" / "globalkd" / "config.py"
ENTRY = "add_globalkd_config"
NODE_TYPES = ("CN", "CfgNode")
HEADER = """# Configuration reference

Every key that this project adds to a Detectron2 config, with its default. Set them in a YAML file
or on the command line, as any other key: `MODEL.GLOBALKD.GLOBAL.WEIGHT 2.0`.

*Generated from the comments of `projects/GlobalKD/globalkd/config.py` by `make docs`; edit those.*
"""


@dataclass
class Entry:
    """A key, or a node where `default` is None, with the comment above it."""

    path: str
    default: Optional[str]
    text: str


def read_entries(source: str) -> List[Entry]:
    """Nodes and keys in the order in which the config gets them.

    Raises:
        ValueError: there is no `add_globalkd_config`, or a key has no comment.
    """
    reader = _Reader(source)
    if ENTRY not in reader.functions:
        raise ValueError(f"there is no function {ENTRY}")
    (root,) = _parameters(reader.functions[ENTRY])[:1]
    return list(reader.read(reader.functions[ENTRY], {root: ""}))


class _Reader:
    """Walks the functions of one source file; `names` maps a local name to its node's path."""

    def __init__(self, source: str):
        self.source = source
        self.comments = _own_line_comments(source)
        functions = [x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef)]
        self.functions = {x.name: x for x in functions}

    def read(self, function: ast.FunctionDef, names: Dict[str, str]) -> Iterator[Entry]:
        for statement in _statements(function.body):
            if isinstance(statement, ast.Assign):
                yield from self._assignment(statement, names)
            elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                yield from self._call(statement.value, names)

    def _assignment(self, statement: ast.Assign, names: Dict[str, str]) -> Iterator[Entry]:
        value = statement.value
        targets = [x for x in statement.targets if isinstance(x, ast.Attribute)]
        paths = [path for path in (_resolve(x, names) for x in targets) if path]
        aliased = paths[0] if paths else _resolve(value, names)
        for target in statement.targets:
            if isinstance(target, ast.Name) and aliased is not None:
                names[target.id] = aliased
        text = self._comment_above(statement.lineno)
        for path in paths:
            if _is_new_node(value):
                yield Entry(path, None, text)
                continue
            if not text:
                raise ValueError(f"line {statement.lineno} sets {path} without a comment above it")
            default = " ".join(ast.get_source_segment(self.source, value).split())
            yield Entry(path, default, text)

    def _call(self, call: ast.Call, names: Dict[str, str]) -> Iterator[Entry]:
        function = self.functions.get(getattr(call.func, "id", None))
        if function is None:
            return
        given = dict(zip(_parameters(function), call.args))
        given.update({keyword.arg: keyword.value for keyword in call.keywords})
        nodes = {name: _resolve(value, names) for name, value in given.items()}
        yield from self.read(function, {k: v for k, v in nodes.items() if v is not None})

    def _comment_above(self, line: int) -> str:
        lines = []
        while line - 1 in self.comments:
            line -= 1
            lines.insert(0, self.comments[line])
        return " ".join(lines)


def _own_line_comments(source: str) -> Dict[int, str]:
    """Line number -> text, of the comments that have a line to themselves."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: token.string.lstrip("#: ").rstrip()
        for token in tokens
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
    }


def _statements(body: List[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.For, ast.With)):
            yield from _statements(statement.body + getattr(statement, "orelse", []))


def _parameters(function: ast.FunctionDef) -> List[str]:
    return [x.arg for x in [*function.args.args, *function.args.kwonlyargs]]


def _resolve(value: ast.expr, names: Dict[str, str]) -> Optional[str]:
    """Dotted path of a node or key; None for anything that is not below a known node."""
    if isinstance(value, ast.Name):
        return names.get(value.id)
    if isinstance(value, ast.Attribute):
        parent = _resolve(value.value, names)
        return None if parent is None else f"{parent}.{value.attr}".lstrip(".")
    return None


def _is_new_node(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and getattr(value.func, "id", None) in NODE_TYPES


def render(entries: List[Entry]) -> str:
    """The page: a table for each node."""
    notes = {entry.path: entry.text for entry in entries if entry.default is None}
    rows: Dict[str, List[str]] = {}
    for entry in entries:
        if entry.default is not None:
            node, _, key = entry.path.rpartition(".")
            cells = [f"`{key}`", f"`{entry.default}`", entry.text]
            cells = [cell.replace("|", "\\|") for cell in cells]
            rows.setdefault(node, []).append("| " + " | ".join(cells) + " |")
    page = HEADER
    for node, lines in rows.items():
        page += f"\n## {node}\n\n"
        page += f"{notes[node]}\n\n" if notes.get(node) else ""
        page += "\n".join(["| Key | Default | Meaning |", "|---|---|---|", *lines]) + "\n"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="the page to write or to check")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the source to read")
    args = parser.parse_args()
    try:
        page = render(read_entries(args.config.read_text()))
    except ValueError as error:
        sys.exit(f"{args.config}: {error}.")
    if not args.check:
        args.page.write_text(page)
    elif not args.page.is_file() or args.page.read_text() != page:
        sys.exit(f"{args.page} does not say what {args.config.name} says: run `make docs`.")


if __name__ == "__main__":
    main()
