"""Frames a second on a card: every family, in each precision, eager and compiled, beside Transformers.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --models detr-resnet-50 --dtypes bfloat16 --batches 1 8 --repeats 20
    python benchmarks/gpu.py --device cpu --size 64x96 --repeats 1 --threads 1    # only to try the script

``engines.py`` with a card's defaults: both sides on the same card, in turns; ``share_of_limit`` is that of
the card's own rate of matrix products in the same precision (in float32 without TF32, which convolutions use
by default: there it can exceed 1). Deformable attention alone, Triton against
Transformers, follows into a file of its own. A side that cannot run a model leaves a row that says so.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import engines

MODELS = (
    "detr-resnet-50",
    "detr-resnet-101",
    "detr-resnet-50-dc5",
    "conditional-detr-resnet-50",
    "deformable-detr-single-scale",
    "deformable-detr",
    "deformable-detr-with-box-refine-two-stage",
    "detr-resnet-50-panoptic",
)


def main() -> None:
    parser = engines.make_parser(__doc__)
    parser.set_defaults(
        models=list(MODELS),
        sides=["torch", "compile", "transformers", "transformers-compile"],
        device="cuda",
        dtypes=["float32", "bfloat16", "float16"],
        batches=[1, 8],
        repeats=10,
        csv=engines.RESULTS / "gpu.csv",
    )
    parser.add_argument("--no-operator", action="store_true", help="leave deformable attention alone out")
    args = engines.parse_arguments(parser)
    if not args.no_operator:
        for dtype in args.dtypes:
            script = str(Path(__file__).with_name("deformable_attention.py"))
            command = [sys.executable, script, "--device", args.device, "--dtype", dtype]
            command += ["--repeats", str(args.repeats), "--threads", str(args.threads)]
            command += ["--csv", str(args.csv.with_name("gpu_deformable_attention.csv"))]
            if args.device == "cpu":
                command += ["--cases", "small-decoder"]
            subprocess.run(command, check=True)
    engines.run(args)


if __name__ == "__main__":
    main()
