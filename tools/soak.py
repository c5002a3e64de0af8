"""Memory over a long run: ``detrkit detect`` on thousands of images, some of them broken.

``python -m tools.soak --images 5000`` prints the memory that the program holds as it goes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import make_picture

SIZES = [(160, 120), (120, 160), (200, 150), (150, 200), (180, 180), (320, 120), (90, 300)]
BROKEN_EVERY = 500


@dataclass
class Soak:
    """What was seen of a run.

    Attributes:
        status: The program's exit status.
        messages: What it said.
        samples: Images done so far and megabytes held, in order.
    """

    status: int
    messages: str
    samples: list[tuple[int, float]]

    def most(self, begin: int, end: int) -> float:
        """The most megabytes while so many images were done."""
        return max((held for done, held in self.samples if begin <= done < end), default=0.0)


def make_images(folder: Path, count: int) -> None:
    """Pictures of many sizes, every so often one that ends early."""
    folder.mkdir()
    originals = [folder / f"{number:07}.jpg" for number in range(70)]
    for number, path in enumerate(originals):
        make_picture(*SIZES[number % len(SIZES)], seed=number).save(path)
    for number in range(len(originals), count):
        path = folder / f"{number:07}.jpg"
        if number % BROKEN_EVERY == 0:
            path.write_bytes(originals[number % len(originals)].read_bytes()[:300])
        else:
            path.hardlink_to(originals[number % len(originals)])


def soak(model: str, images: Path, out: Path, threads: int) -> Soak:
    """Runs the program to its end."""
    command = [sys.executable, "-m", "detrkit", "detect", str(images), "--model", model, "-t", "0.1"]
    journal = out.with_name(f"{out.name}.unfinished.jsonl")
    samples = []
    with tempfile.TemporaryFile("w+") as messages:
        process = subprocess.Popen(
            [*command, "--json", str(out)],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
            stderr=messages,
        )
        lines = place = 0
        while process.poll() is None:
            time.sleep(0.2)
            if journal.exists():
                with journal.open("rb") as file:
                    file.seek(place)
                    fresh = file.read()
                lines, place = lines + fresh.count(b"\n"), place + len(fresh)
            held = _megabytes(process.pid)
            if held is not None:
                samples.append((max(lines - 1, 0), held))
        messages.seek(0)
        return Soak(process.returncode, messages.read(), samples)


def _megabytes(process: int) -> float | None:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):  # it has just ended
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--model", default="blood-cells")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="detrkit-soak-") as work:
        folder, out = Path(work, "images"), Path(work, "out.json")
        make_images(folder, args.images)
        started = time.monotonic()
        seen = soak(args.model, folder, out, args.threads)
        seconds = time.monotonic() - started
        tenth = args.images // 10
        for begin in range(0, args.images, tenth):
            most = seen.most(begin, begin + tenth)
            print(f"images {begin:7} to {begin + tenth:7}: at most {most:.0f} MB")
        size = out.stat().st_size / 1e6
        print(f"status {seen.status}, {seconds:.0f} s, document {size:.1f} MB; the end of what it said:")
        print(seen.messages[-1500:])


if __name__ == "__main__":
    main()
