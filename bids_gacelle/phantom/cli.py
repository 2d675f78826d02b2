"""``bids-gacelle-phantom``: write the digital brain."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bids_gacelle import __version__
from bids_gacelle.errors import InputError

USAGE = 2
MODELS = {
    "megre": ("r2star",),
    "vfa": ("despot1",),
    "dwi": ("mcmicro", "nexi"),
    "mwi": ("mcrmwi",),
}
DEFAULT = ("megre", "vfa", "dwi")
SECONDS_BETWEEN_LINES = 5.0


class Teller:
    """Prints what is being done, now and then, so that a long run is seen to move."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, what: str) -> None:
        """Print it if the last line is some seconds old."""
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            print(what, file=sys.stderr, flush=True)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="bids-gacelle-phantom",
        description="Write a raw BIDS dataset of digital brains, with the true parameter maps and "
        "tissue labels in derivatives/truth.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the dataset to write")
    parser.add_argument("--subjects", metavar="N", type=int, default=2, help="how many subjects")
    parser.add_argument("--sessions", metavar="M", type=int, default=1, help="sessions of each")
    parser.add_argument(
        "--snr",
        metavar="S",
        type=float,
        default=50.0,
        help="white matter over noise in echo 1, the best flip angle and b=0; inf for none",
    )
    parser.add_argument(
        "--contrasts",
        metavar="LIST",
        default=",".join(DEFAULT),
        help=f"some of {', '.join(MODELS)}, with commas",
    )
    parser.add_argument("--resolution", metavar="MM", type=float, default=4.0, help="voxel size")
    parser.add_argument("--seed", metavar="SEED", type=int, default=0, help="of all randomness")
    parser.add_argument(
        "--dwi-model",
        metavar="MODEL",
        default="nexi",
        help="nexi or mcmicro: what makes the diffusion signals",
    )
    parser.add_argument(
        "--phase",
        action="store_true",
        help="write the multi-echo gradient echo (megre) as magnitude and phase; mwi always is",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier digital brain at OUT"
    )
    parser.add_argument("--version", action="version", version=f"bids_gacelle {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 when it cannot be done."""
    options = build_parser().parse_args(argv)
    contrasts = [word.strip() for word in options.contrasts.split(",") if word.strip()]
    try:
        # Imported here so that --help and usage errors answer at once.
        from bids_gacelle.phantom.write import write_phantom

        written = write_phantom(
            options.out,
            subjects=options.subjects,
            sessions=options.sessions,
            snr=options.snr,
            contrasts=contrasts,
            resolution=options.resolution,
            seed=options.seed,
            dwi_model=options.dwi_model,
            phase=options.phase,
            overwrite=options.overwrite,
            progress=Teller(),
        )
    except InputError as error:
        print(f"bids-gacelle-phantom: error: {error}", file=sys.stderr)
        return USAGE
    size = sum(path.stat().st_size for path in written) / 1e6
    print(f"Wrote {len(written)} images ({size:.0f} MB) to {options.out}")
    print("Fit them with:\n  " + suggestion(options.out, contrasts))
    return 0


def suggestion(out: Path, contrasts: Sequence[str]) -> str:
    """Return the ``bids-gacelle`` command that fits everything in the dataset, for a shell."""
    models = [model for contrast in contrasts for model in MODELS[contrast]]
    words = ["bids-gacelle", str(out), str(out / "derivatives" / "bids_gacelle"), "participant"]
    words += ["--models", ",".join(models), "-d", f"truth={out / 'derivatives' / 'truth'}"]
    words += ["--combine-dwi"] if "dwi" in contrasts else []
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
