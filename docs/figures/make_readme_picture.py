"""Makes the drawing in README.md: an example image with a model's detections.

python docs/figures/make_readme_picture.py --model blood-cells --threshold 0.35
"""

from __future__ import annotations

import argparse
from pathlib import Path

from detrkit import Detector
from detrkit.common.files import atomic_file

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Reads the arguments and writes the drawing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--model", default="blood-cells", help="Hub id, folder, or a name from: detrkit models"
    )
    parser.add_argument("--image", type=Path, default=ROOT / "examples" / "BloodImage_00000.jpg")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "figures" / "readme.jpg")
    parser.add_argument("--threshold", type=float, help="by default as chosen for the model")
    arguments = parser.parse_args()

    detections = Detector.from_pretrained(arguments.model)(arguments.image, threshold=arguments.threshold)
    with atomic_file(arguments.output) as temporary:
        detections.draw().save(temporary, format="JPEG", quality=88)
    print(detections)


if __name__ == "__main__":
    main()
