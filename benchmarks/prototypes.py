#!/usr/bin/env python
"""Time and memory of choosing prototypes, beside the direct method.

    benchmarks/prototypes.py
    benchmarks/prototypes.py --dims 256 --instances 1000 10000 100000 1000000 --json rows.json

"ours" is `globalkd.prototypes.sparse_coding.select_atoms`. "direct" computes every residual and
tries every candidate on every instance, in float64; it runs up to --direct-limit instances, and
must choose the same rows there. Memory is the peak of the process (of the device, on a GPU) while
choosing.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from setting import PeakMemory
from tabulate import tabulate

from globalkd.prototypes.sparse_coding import TIE, pair_coefficients, select_atoms, unit_rows

LAMBDA = 10.0
COLUMNS = ("method", "instances", "dim", "prototypes", "seconds", "peak_bytes", "feature_bytes")


def instance_features(rows, dim, device):
    """Unit-length float32 features of both spaces around a common structure, (R, D) each."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(rows, 16, generator=generator)

    def view():
        x = torch.randn(rows, dim, generator=generator).mul_(0.5)
        x.addmm_(latent, torch.randn(16, dim, generator=generator))
        for part in x.split(4096):
            part.copy_(unit_rows(part))
        return x.to(device)

    return view(), view()


def direct(teacher, student, num_atoms, lam):
    """Greedy descent on Eq. (2) by residuals: O(R^2 D) a pick; a block of candidates at a time."""
    atoms_t, atoms_s = teacher.double(), student.double()
    r_t, r_s = atoms_t.clone(), atoms_s.clone()
    n_t, n_s = (x.square().sum(dim=1) for x in (atoms_t, atoms_s))
    energy = n_t.sum() + n_s.sum()
    free = (n_t > 0) & (n_s > 0)
    blocks = torch.arange(len(r_t), device=r_t.device).split(max(1, 2**22 // len(r_t)))
    picks = []
    while len(picks) < num_atoms:
        gain = []
        for rows in blocks:
            u, v = r_t @ atoms_t[rows].T, r_s @ atoms_s[rows].T  # (R, block)
            w_t, w_s = pair_coefficients(u, v, n_t[rows], n_s[rows], lam)
            gain.append((u * w_t + v * w_s).sum(dim=0))
        gain = torch.cat(gain).masked_fill_(~free, float("-inf"))
        pick = int((gain >= gain.max() - TIE * energy).nonzero()[0])
        p_t, p_s = atoms_t[pick], atoms_s[pick]
        w_t, w_s = pair_coefficients(r_t @ p_t, r_s @ p_s, n_t[pick], n_s[pick], lam)
        r_t -= w_t[:, None] * p_t
        r_s -= w_s[:, None] * p_s
        free[pick] = False
        picks.append(pick)
    return picks


def ours(teacher, student, num_atoms, lam):
    return select_atoms(teacher, student, num_atoms, lam)[0].tolist()


def measure(method, teacher, student, num_atoms, repeats):
    """The method's picks and its row of the table.

    The time is the least of the repeats: whatever else runs on the machine only adds to it.
    """
    seconds, peaks = [], []
    for _ in range(repeats):
        with PeakMemory(teacher.device.type) as memory:
            start = time.perf_counter()
            picks = method(teacher, student, num_atoms, LAMBDA)
            seconds.append(time.perf_counter() - start)
        peaks.append(memory.bytes)
    features = sum(x.numel() * x.element_size() for x in (teacher, student))
    peak = features + max(peaks) if max(peaks) else None
    values = (method.__name__, len(teacher), teacher.shape[1], num_atoms)
    return picks, dict(zip(COLUMNS, (*values, min(seconds), peak, features)))


def exponent(rows):
    """Least-squares slope of log seconds over log instances."""
    x = [math.log(r["instances"]) for r in rows]
    y = [math.log(r["seconds"]) for r in rows]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def table(rows):
    """The rows for people, as Markdown: one line for each number of instances and of channels."""
    direct = {(r["dim"], r["instances"]): r["seconds"] for r in rows if r["method"] == "direct"}
    lines = []
    for row in (r for r in rows if r["method"] == "ours"):
        peak = row["peak_bytes"]
        slow = direct.get((row["dim"], row["instances"]))
        lines.append(
            {
                "channels": row["dim"],
                "instances": f"{row['instances']:,}",
                "seconds": f"{row['seconds']:.2f}",
                "peak memory / features": peak and f"{peak / row['feature_bytes']:.2f}",
                "direct method, seconds": slow and f"{slow:.1f}",
            }
        )
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def show(row):
    peak = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / row['feature_bytes']:.3f}"
    print(
        f"{row['method']:8}{row['instances']:>10,}{row['dim']:>6}{row['seconds']:>10.3f} s"
        f"{row['feature_bytes'] / 2**20:>10.1f} MiB   x {peak}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [1_000, 3_000, 10_000, 30_000, 100_000]
    parser.add_argument("--instances", type=int, nargs="+", default=sizes, help="of one class")
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 1024], help="of each space")
    parser.add_argument("--prototypes", type=int, default=10)
    parser.add_argument("--direct-limit", type=int, default=3_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    ours(*instance_features(5_000, args.dims[0], device), args.prototypes, LAMBDA)  # warm up

    print("method   instances   dim      time         features   peak memory / features")
    rows, differ = [], []
    for dim in args.dims:
        for count in args.instances:
            features = instance_features(count, dim, device)
            picks, row = measure(ours, *features, args.prototypes, args.repeats)
            show(row)
            rows.append(row)
            if count <= args.direct_limit:
                expected, row = measure(direct, *features, args.prototypes, 1)
                show(row)
                rows.append(row)
                differ += [(count, dim)] if expected != picks else []
        timed = [r for r in rows if r["method"] == "ours" and r["dim"] == dim]
        if len(timed) > 1:
            print(f"D = {dim}: time grows with instances to the power {exponent(timed):.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    if differ:
        sys.exit(f"The picks differ from the direct method's at (instances, dim) {differ}.")
    print("Wherever the direct method ran, the picks are the same.")


if __name__ == "__main__":
    main()
