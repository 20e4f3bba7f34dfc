"""What the command lines of these scripts have alike."""

import argparse
from pathlib import Path


def parsed(
    parser: argparse.ArgumentParser, tiny: str, output: str = "results/<device>.jsonl"
) -> argparse.Namespace:
    """Parse with `--tiny`, whose help is given, and `--output`, which small runs must have."""
    parser.add_argument("--tiny", action="store_true", help=tiny)
    parser.add_argument("--output", type=Path, help=f"instead of {output}")
    args = parser.parse_args()
    if args.tiny and args.output is None:
        parser.error("--tiny needs --output: it measures nothing that is to be kept")
    return args
