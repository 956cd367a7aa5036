"""`python -m tracker show|diff|validate|export PATH`: what lies on the disk, told, checked, or exported.

show PATH       what it holds, for people
diff ONE TWO    how two of a kind differ; the exit status is 1 if they do
validate PATH   whether it is whole and as its schema says; the exit status is 1 if not
export PATH --to gguf|hf|onnx --model module:function
                a checkpoint as other tools take it, run and compared before it is kept; the exit status is 1 if not
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TextIO

from tracker.checkpoint.inspect import differences, find, shown
from tracker.errors import TrackerError
from tracker.utils.text import plain


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 for a difference or a damaged file, 2 for a wrong call."""
    parser = argparse.ArgumentParser(
        prog="python -m tracker",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="show|diff|validate|export"
    )
    commands.add_parser("show", help="tell what it holds").add_argument("path")
    both = commands.add_parser("diff", help="tell how two of a kind differ")
    both.add_argument("path")
    both.add_argument("other")
    commands.add_parser("validate", help="check that it is whole").add_argument("path", nargs="+")
    _add_export(commands.add_parser("export", help="write a checkpoint as other tools take it"))
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "show":
            _say(shown(find(asked.path)))
            return 0
        if asked.command == "diff":
            found = differences(find(asked.path), find(asked.other))
            _say("\n".join(found) or "No difference.")
            return int(bool(found))
        if asked.command == "export":
            from tracker.export.command import export_checkpoint

            given = {k: v for k, v in vars(asked).items() if k != "command"}
            _say(export_checkpoint(**given))
            return 0
    except TrackerError as error:
        _say(error, sys.stderr)
        return 1
    return max(_validated(path) for path in asked.path)


def _add_export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", help="the checkpoint, a directory")
    add("--to", required=True, help="gguf, hf, onnx, or module:function of an exporter of your own")
    add("--model", default="", help="module:function that builds the model as before all changes")
    add(
        "--config",
        default="",
        help="instead: config.json of a model of transformers, or its folder",
    )
    add("--output", help="where to write (beside the checkpoint)")
    add("--tokenizer", default="", help="folder of a tokenizer of transformers, for gguf and hf")
    add("--dtype", default="f16", choices=("f32", "f16", "q8_0"), help="of matrices, for gguf")


def _validated(path: str) -> int:
    try:
        _say(f"{path}: {find(path).kind}, whole and as its schema says")
    except TrackerError as error:
        _say(f"{path}: {error}", sys.stderr)
        return 1
    return 0


def _say(text: object, stream: TextIO | None = None) -> None:
    """Names come from files: what would steer a terminal is shown, and not sent to it."""
    print(plain(text), file=stream or sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
