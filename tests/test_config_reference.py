"""config.py: the reference made from it leaves nothing out, and the package reads every key."""

import ast
import importlib.util
import subprocess
import sys
from functools import cache
from inspect import signature
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from globalkd.config import add_globalkd_config
from globalkd.losses import DISTILL_LOSS_REGISTRY

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "config_reference.py"
CONFIG = ROOT / "projects" / "GlobalKD" / "globalkd" / "config.py"

spec = importlib.util.spec_from_file_location("config_reference", TOOL)
config_reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(config_reference)


def keys(node, prefix=""):
    """Dotted key -> value of every leaf of a config."""
    leaves = {}
    for name, value in node.items():
        if isinstance(value, CfgNode):
            leaves.update(keys(value, f"{prefix}{name}."))
        else:
            leaves[prefix + name] = value
    return leaves


def added_defaults():
    """Dotted key -> default, of the keys that this project adds."""
    cfg = get_cfg()
    stock = keys(cfg)
    add_globalkd_config(cfg)
    return {key: value for key, value in keys(cfg).items() if key not in stock}


def parse(body):
    return config_reference.read_entries("def add_globalkd_config(cfg):\n" + body)


def run(*args):
    command = [sys.executable, str(TOOL), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_reference_holds_exactly_the_keys_that_the_code_adds_with_their_defaults():
    entries = config_reference.read_entries(CONFIG.read_text())
    documented = {x.path: ast.literal_eval(x.default) for x in entries if x.default is not None}
    assert documented == added_defaults()


def test_every_key_is_on_the_page_once():
    entries = config_reference.read_entries(CONFIG.read_text())
    page = config_reference.render(entries)
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len({x.path for x in entries if x.default is not None})


def test_nodes_are_followed_through_names_and_calls():
    source = """
def add_globalkd_config(cfg):
    cfg.MODEL.X = node = CN()
    # A, over
    # two lines.
    node.A = [1,
              2]
    _add_more(node=cfg.MODEL.X)

def _add_more(node: CN):
    inner = node.Y = CfgNode()
    if True:
        # B.
        inner.B = "b"
"""
    entries = config_reference.read_entries(source)
    found = [(x.path, x.default, x.text) for x in entries if x.default is not None]
    assert found == [
        ("MODEL.X.A", "[1, 2]", "A, over two lines."),
        ("MODEL.X.Y.B", '"b"', "B."),
    ]


def test_only_the_comment_directly_above_belongs_to_a_key():
    body = "    # Far.\n\n    # Near.\n    cfg.A = 1  # beside\n"
    (entry,) = parse(body)
    assert entry.text == "Near."


def test_a_key_without_a_comment_is_refused_by_name():
    with pytest.raises(ValueError, match="line 4 sets MODEL.B without a comment"):
        parse("    # Of A.\n    cfg.MODEL.A = 1\n    cfg.MODEL.B = 2\n")


def test_the_source_is_not_run():
    assert parse("    raise SystemExit\n\nraise SystemExit('run')\n") == []


def test_a_bar_in_a_comment_does_not_break_the_table():
    page = config_reference.render(parse("    # a | b\n    cfg.A = 1\n"))
    assert "| `A` | `1` | a \\| b |" in page


def test_check_passes_on_a_fresh_page_and_names_a_stale_one(tmp_path):
    page = tmp_path / "config.md"
    missing = run("--check", page)
    assert missing.returncode == 1 and not page.exists()
    assert run(page).returncode == 0
    assert run("--check", page).returncode == 0
    page.write_text(page.read_text().replace("Eq. 6", "Eq. 7"))
    stale = run("--check", page)
    assert stale.returncode == 1
    assert stale.stderr == f"{page} does not say what config.py says: run `make docs`.\n"


def attribute_chains(path):
    """Every dotted attribute access of a source file, as tuples: a.b.c -> ("a", "b", "c")."""
    for node in ast.walk(ast.parse(path.read_text())):
        chain = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        if chain and isinstance(node, ast.Name):
            yield (node.id, *chain)


def reads(chains, key):
    """Whether a file reads cfg.A.B.C, or names a node such as cfg.A and reads name.B.C."""
    if any(chain[-len(key) :] == key for chain in chains):
        return True
    return any(
        any(chain[-i:] == key[:i] for chain in chains) and any(x[1:] == key[i:] for x in chains)
        for i in range(1, len(key))
    )


@cache
def chains_by_file():
    sources = [path for path in CONFIG.parent.rglob("*.py") if path.name != "config.py"]
    return [set(attribute_chains(path)) for path in sources]


#: Their keys are arguments of a loss, all of them: see the test below.
LOSS_NODES = {f"MODEL.GLOBALKD.{cls.node}" for _, cls in DISTILL_LOSS_REGISTRY if cls.node}


@pytest.mark.parametrize(
    "key", sorted(k for k in added_defaults() if k.rpartition(".")[0] not in LOSS_NODES)
)
def test_no_key_that_nothing_reads(key):
    assert any(reads(chains, tuple(key.split("."))) for chains in chains_by_file()), (
        f"nothing below {CONFIG.parent.name}/ reads {key}: read it or remove it from config.py"
    )


@pytest.mark.parametrize("name, cls", list(DISTILL_LOSS_REGISTRY), ids=lambda x: x)
def test_a_loss_built_by_hand_has_the_defaults_of_the_config(name, cls):
    if not cls.__module__.startswith("globalkd."):
        pytest.skip("a loss of another test")
    cfg = get_cfg()
    add_globalkd_config(cfg)
    parameters = signature(cls.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    configured = {
        k: tuple(v) if isinstance(v, list) else v for k, v in cls.from_config(cfg).items()
    }
    assert configured == defaults
