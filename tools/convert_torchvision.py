#!/usr/bin/env python
"""Convert torchvision's ResNet weights into a backbone checkpoint that Detectron2 loads.

    tools/convert_torchvision.py resnet152-f82ba261.pth output/ImageNet/R-152.pkl

A configuration that uses it needs torchvision's conventions: INPUT.FORMAT "RGB",
MODEL.PIXEL_MEAN [123.675, 116.280, 103.530], MODEL.PIXEL_STD [58.395, 57.120, 57.375] and
MODEL.RESNETS.STRIDE_IN_1X1 False.
"""

import argparse
import pickle
import re
from pathlib import Path

import torch

from globalkd.engine.command_line import user_errors

#: Entries that every ResNet of torchvision has, and hardly anything else.
RESNET = {"conv1.weight", "layer1.0.conv1.weight", "layer4.0.downsample.0.weight"}


def read(source):
    """The state dict in a file of torchvision's.

    Raises:
        OSError: no such file.
        ValueError: the file is damaged, or holds something else.
    """
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged files fail in many ways
        raise ValueError(
            f"{source}: PyTorch cannot read it ({type(error).__name__}). It must be a .pth file of "
            "torchvision's, such as resnet152-f82ba261.pth."
        ) from error
    entries = state if isinstance(state, dict) else {}
    if not entries.keys() >= RESNET:
        found = ", ".join(map(str, list(entries)[:3])) or f"a {type(state).__name__}"
        raise ValueError(
            f"{source} holds {found}: that is no state dict of a torchvision ResNet, which has "
            f"{', '.join(sorted(RESNET))}."
        )
    return state


def detectron2_name(name):
    """The name of a torchvision ResNet entry in Detectron2's ResNet."""
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda found: f"res{int(found.group(1)) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut")
    return name.replace("downsample.1", "shortcut.norm")


def convert(state):
    """Detectron2's checkpoint of a torchvision state dict; the classifier is left out."""
    kept = {
        name: value
        for name, value in state.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    model = {detectron2_name(name): value.detach().numpy() for name, value in kept.items()}
    return {"model": model, "__author__": "torchvision", "matching_heuristics": True}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="torchvision's .pth file")
    parser.add_argument("output", help="the .pkl to write")
    args = parser.parse_args()
    with user_errors(parser):
        checkpoint = convert(read(args.source))
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "wb") as stream:
            pickle.dump(checkpoint, stream)
    print(f"{args.output}: {len(checkpoint['model'])} entries.")


if __name__ == "__main__":
    main()
