"""Reading a configuration file safely, and telling its author what is wrong with it.

`load_config` is the one way from a YAML file to a config, for `train_net.py`, the tools and the
teacher. Not here: the keys and their defaults (`config`), and what only the detectors can tell,
such as levels that do not match (`features`, `pairing`, the losses).
"""

import copy
import difflib
import logging
import math
import os
import re
from operator import attrgetter
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.file_io import PathManager

from .config import add_globalkd_config

logger = logging.getLogger(__name__)

_ZOO = os.path.realpath(os.path.join(os.path.dirname(model_zoo.__file__), "configs"))


def load_config(
    config_file: str,
    opts: Sequence[str] = (),
    like: Optional[CfgNode] = None,
    opts_of: str = "the command line",
) -> CfgNode:
    """Read a YAML file and overrides into a config with this project's keys.

    YAML that would run code (tags such as `!!python/object/apply`) is refused, also in a file that
    is named by `_BASE_`. The files of Detectron2's own model zoo are trusted as its code is: one of
    them computes its anchor sizes by such a tag.

    Args:
        config_file: path of the file.
        opts: overrides, `["KEY", "VALUE", ...]`, as on a command line.
        like: a config whose keys beyond Detectron2's and ours, another project's, the file may have
            as well; they begin with the values that they have there.
        opts_of: where `opts` come from, for messages.

    Returns:
        The config, not frozen, checked by `check_config`.

    Raises:
        FileNotFoundError: no such file, or no such `_BASE_`.
        ValueError: YAML that cannot be read or would run code, a key that does not exist (the
            nearest one is named), a value of another type or out of range.
    """
    cfg = get_cfg()
    add_globalkd_config(cfg)
    if like is not None and (added := _add_missing(cfg, like)):
        logger.info(
            f"{config_file}: what it does not set of {added} is as in the student's config."
        )
    if flags := [x for x in opts if str(x).startswith("--")]:
        raise ValueError(f"{flags[0]} stands among the KEY VALUE pairs: it must come before them.")
    cfg = _SafeCfgNode(cfg)
    _require_file(config_file)
    _merge(cfg, config_file, lambda: cfg.merge_from_file(config_file))
    _merge(cfg, opts_of, lambda: cfg.merge_from_list(list(opts)))
    cfg = CfgNode(cfg)
    check_config(cfg)
    return cfg


def _require_file(path: str) -> None:
    if "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(f"There is no config file {path} (seen from {os.getcwd()})")


def _add_missing(cfg: CfgNode, like: CfgNode, prefix: str = "") -> List[str]:
    """Copy keys that only `like` has; returns their names, or those of their groups."""
    added = []
    for name, value in like.items():
        if name not in cfg:
            cfg[name] = copy.deepcopy(value)
            added.append(prefix + name)
        elif isinstance(value, CfgNode) and isinstance(cfg[name], CfgNode):
            added += _add_missing(cfg[name], value, f"{prefix}{name}.")
    return added


class _SafeCfgNode(CfgNode):
    """Decides file by file whether YAML may run code; `_BASE_` is loaded through here, too.

    Where a float belongs it takes a whole number as well.
    """

    def merge_from_other_cfg(self, cfg_other):
        _whole_to_float(self, cfg_other)
        return super().merge_from_other_cfg(cfg_other)

    def merge_from_list(self, cfg_list):
        cfg_list = list(cfg_list)
        floats = {key for key, value in leaves(self) if isinstance(value, float)}
        for i in range(0, len(cfg_list) - 1, 2):
            if cfg_list[i] in floats and re.fullmatch(r"[+-]?\d+", str(cfg_list[i + 1])):
                cfg_list[i + 1] = f"{cfg_list[i + 1]}.0"
        return super().merge_from_list(cfg_list)

    @classmethod
    def load_yaml_with_base(cls, filename, allow_unsafe=False):
        _require_file(filename)
        trusted = os.path.realpath(filename).startswith(_ZOO + os.sep)
        try:
            _refuse_keys_written_twice(filename)
            return super().load_yaml_with_base(filename, allow_unsafe=trusted)
        except yaml.constructor.ConstructorError as error:
            raise ValueError(
                f"{filename} has a YAML tag whose reading could run code: {error.problem}"
                f"{error.problem_mark}. Write the value itself."
            ) from error
        except yaml.YAMLError as error:
            raise ValueError(f"it is not YAML: {error}") from error
        except TypeError as error:
            raise ValueError(f"{filename} does not hold KEY: VALUE lines") from error


def _refuse_keys_written_twice(filename: str) -> None:
    """Refuse two groups of one name: YAML would keep the last and lose what the first says."""
    with PathManager.open(filename) as file:
        nodes = [yaml.compose(file, Loader=yaml.SafeLoader)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            lines: Dict[str, int] = {}
            for key, value in node.value:
                nodes.append(value)
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise ValueError(
                        f"{filename} has {key.value} twice in one group, in lines "
                        f"{lines[key.value]} and {line}: write them as one."
                    )
                lines[key.value] = line


def _whole_to_float(own: CfgNode, other: CfgNode) -> None:
    for name, value in other.items():
        if isinstance(value, dict) and isinstance(own.get(name), CfgNode):
            _whole_to_float(own[name], value)
        elif type(value) is int and isinstance(own.get(name), float):
            other[name] = float(value)


def _merge(cfg: CfgNode, source: str, merge) -> None:
    """Run a merge; say what is wrong in terms of the source and of the keys that there are."""
    try:
        merge()
    except (KeyError, AssertionError) as error:
        text = str(error.args[0])
        unknown = re.fullmatch(r"Non-existent (?:config )?key: (.*)", text)
        if unknown:
            text = f"there is no key {unknown[1]}.{_nearest(cfg, unknown[1])}"
        raise ValueError(f"{source}: {text}") from error
    except ValueError as error:
        text = str(error)
        mismatch = re.fullmatch(r"Type mis.* vs\. (.*)\) for config key: (\S+)", text, re.DOTALL)
        if mismatch:
            text = f"{mismatch[2]} is {mismatch[1]}; it must be {_kind(cfg, mismatch[2])}."
        raise ValueError(f"{source}: {text}") from error
    except RecursionError as error:
        raise ValueError(f"{source}: its _BASE_ files name each other in a circle") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{source}: a value stands where a group of keys belongs, or a key is no text ({error})"
        ) from error


def _kind(cfg: CfgNode, key: str) -> str:
    """What a key's value must be, in words."""
    value = attrgetter(key)(cfg)
    if isinstance(value, CfgNode):
        return f"a group of keys, such as {', '.join(list(value)[:3])}"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}, such as {value!r}"


def _nearest(cfg: CfgNode, key: str) -> str:
    """A question that names the nearest keys, or else what the key's group has; "" without one."""
    known = [name.rpartition(".")[::2] for name in dict(leaves(cfg)) if name != key]
    group, _, name = key.rpartition(".")
    siblings = [other for where, other in known if where == group]
    if siblings:
        near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
        found = [f"{group}.{other}" for other in near]
    else:
        found = difflib.get_close_matches(key, map(".".join, known), n=1, cutoff=0.85)
    if not found:
        near = difflib.get_close_matches(name, {other for _, other in known}, n=1, cutoff=0.8)
        found = [f"{where}.{other}" for where, other in known if other in near]
    if found:
        return f" Did you mean {' or '.join(found[:4])}?"
    return f" Those of {group} are {', '.join(siblings)}." if siblings else ""


def leaves(node: CfgNode, prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """The keys below a node with their values; `prefix` stands before each, "MODEL." for one."""
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def check_config(cfg: CfgNode) -> None:
    """Check what can be told from the config alone: signs of our numbers, and contradictions.

    Narrower ranges are checked where a number is used, by its constructor.

    Raises:
        ValueError: the message names the key, the value and what would be right.
    """
    for key, value in leaves(cfg.MODEL.GLOBALKD, "MODEL.GLOBALKD."):
        values = value if isinstance(value, (list, tuple)) else [value]
        numbers = [x for x in values if isinstance(x, (int, float))]
        if key != "MODEL.GLOBALKD.TEACHER.OPTS" and not all(0 <= x < math.inf for x in numbers):
            raise ValueError(f"{key} is {value}; it must be 0 or more and finite.")
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}; it must be a device of PyTorch, such as "
            "'cuda', 'cuda:1' or 'cpu'."
        ) from error
    _check_architecture(cfg.MODEL.META_ARCHITECTURE)
    node = cfg.MODEL.GLOBALKD
    if 0 < node.STOP_ITER < node.WARMUP_ITERS:
        raise ValueError(
            f"MODEL.GLOBALKD.STOP_ITER is {node.STOP_ITER}, before the end of the warm-up, "
            f"MODEL.GLOBALKD.WARMUP_ITERS = {node.WARMUP_ITERS}: raise one or lower the other."
        )
    if cfg.SOLVER.MAX_ITER in cfg.SOLVER.STEPS:
        raise ValueError(
            f"SOLVER.STEPS {cfg.SOLVER.STEPS} contains SOLVER.MAX_ITER = {cfg.SOLVER.MAX_ITER}: "
            "the learning rate can only be lowered before the end of the training."
        )


def _check_architecture(name: str) -> None:
    """Refuse a name that is not registered but near to one that is: a typing error."""
    known = [registered for registered, _ in META_ARCH_REGISTRY]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if near and name not in known:
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {name!r}, which is not registered. Did you mean "
            f"{near[0]!r}? One of your own needs its module to be imported."
        )


def fall_back_to_cpu(cfg: CfgNode) -> None:
    """Set MODEL.DEVICE to cpu, with a warning, where it is cuda and there is no GPU.

    SOLVER.AMP.ENABLED is then set to False, likewise.
    """
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning(f"No GPU here: MODEL.DEVICE is cpu instead of {cfg.MODEL.DEVICE}.")
        cfg.MODEL.DEVICE = "cpu"
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
        logger.warning(
            "SOLVER.AMP.ENABLED is False instead of True: Detectron2 needs a GPU for it."
        )
        cfg.SOLVER.AMP.ENABLED = False
