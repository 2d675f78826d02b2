"""``bids-gacelle``: parse, hand over, and turn the outcome into an exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from bids_gacelle.cli.parser import build_parser, models_to_list, settings_from
from bids_gacelle.errors import InputError

USAGE, INTERNAL = 2, 70


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (see ``--help``)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        listed = models_to_list(argv)
        return _run(argv) if listed is None else _list_models(listed)
    except InputError as error:
        print(f"bids-gacelle: error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("bids-gacelle: stopped; finished maps are kept.", file=sys.stderr)
        return 130
    except Exception:
        logging.getLogger("bids_gacelle").debug("internal error", exc_info=True)
        import traceback

        print(
            "bids-gacelle: internal error. This is a fault of ours; please report it with the "
            "lines below.\n" + traceback.format_exc(),
            file=sys.stderr,
        )
        return INTERNAL


def _run(argv: list[str]) -> int:
    namespace = build_parser().parse_args(argv)
    level = logging.DEBUG if getattr(namespace, "verbose", 0) else logging.INFO
    settings = settings_from(namespace)
    # Imported here so that --help, --version and usage errors answer at once.
    from bids_gacelle.workflows import run

    if settings.analysis_level == "group":
        return run.group(settings)
    if "dry_run" in namespace:
        return run.dry_run(settings)
    if "reports_only" in namespace:
        return run.reports_only(settings)
    return run.participant(settings, command=["bids-gacelle", *argv], level=level)


def _list_models(files: list[Path]) -> int:
    from bids_gacelle.interfaces.model_files import load_model_files
    from bids_gacelle.interfaces.models import describe_models

    load_model_files(files)
    print(describe_models())
    return 0


if __name__ == "__main__":
    sys.exit(main())
