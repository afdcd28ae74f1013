"""Command lines whose mistakes are one line."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import jsonargparse


class Parser(jsonargparse.ArgumentParser):
    """Says what is wrong with a command in one line, and exits with code 2. Flags are written in full."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        command = (getattr(ex, "subcommand_parser", None) or self).prog.replace(" [options]", "")
        print(f"error: {' '.join(message.split())} (see {command} --help)", file=sys.stderr)
        raise SystemExit(2)
