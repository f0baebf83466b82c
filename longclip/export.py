"""Export a CLIP or Long-CLIP to the format that other software reads.

    python -m longclip.export var/demo/finetuned/checkpoint --to open_clip exported/open_clip

`python -m longclip.convert` reads all of these formats back. Software built on transformers needs no export: a
checkpoint directory is its format.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longclip.command_line import run_command
from longclip.errors import CheckpointError, ConfigError
from longclip.files import whole_directory, whole_file
from longclip.weights.formats import FORMATS

if TYPE_CHECKING:
    from longclip.checkpoint import Checkpoint


def export_checkpoint(checkpoint: "Checkpoint", format_name: str, destination: str | Path) -> str:
    """Write a CLIP in another format, to a temporary path that one rename publishes.

    Args:
        checkpoint: what to write.
        format_name: one of `longclip.weights.formats.FORMATS`.
        destination: file or directory, depending on the format; must not exist.

    Returns:
        How to load the result.

    Raises:
        ConfigError: the format is unknown, or the destination exists.
        CheckpointError: the format cannot hold this model.
    """
    if format_name not in FORMATS:
        raise ConfigError(f"format '{format_name}' is unknown; allowed are {', '.join(FORMATS)}")
    _require_free(destination)
    chosen = FORMATS[format_name]
    try:
        with (whole_directory if chosen.is_directory else whole_file)(destination) as temporary:
            usage = chosen.write(checkpoint, temporary)
    except CheckpointError as error:
        raise CheckpointError(f"format '{format_name}': {error}") from error
    return usage.format(path=destination)


def _require_free(destination: str | Path) -> None:
    """Refuse to replace anything, before any work is done."""
    if Path(destination).exists():
        raise ConfigError(f"destination '{destination}' exists; choose another one, or remove it first")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> str:
    from longclip.weights.reading import read_source

    started = time.perf_counter()
    _require_free(options.destination)
    conversion = read_source(options.checkpoint)
    usage = export_checkpoint(conversion.checkpoint, options.format, options.destination)
    path = Path(options.destination)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e6
    assumed = ", quick_gelu assumed" if conversion.activation_assumed else ""
    return (
        f"{conversion.source_format} -> {options.format}: {conversion.checkpoint.context_length} positions{assumed},"
        f" {len(files)} files, {size:.1f} MB, {time.perf_counter() - started:.1f} s\n{path}: {usage}"
    )


def _parser() -> argparse.ArgumentParser:
    formats = "\n".join(f"  {name:<22} {chosen.content}" for name, chosen in FORMATS.items())
    parser = argparse.ArgumentParser(
        prog="python -m longclip.export",
        description="Export a CLIP or Long-CLIP to the format that other software reads.",
        epilog=f"""\
formats:
{formats}

examples:
  python -m longclip.export var/demo/finetuned/checkpoint --to open_clip exported/open_clip
  python -m longclip.export checkpoints/longclip-b --to long-clip exported/longclip-B.pt

exit status: 0 success, 2 wrong option or destination, 4 unusable checkpoint, or one that the format cannot hold, 1 any
other error. `python -m longclip.convert` reads all of these formats back.
Software built on transformers needs no export: a checkpoint directory is its format.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory, or anything that longclip.convert reads")
    parser.add_argument("--to", required=True, dest="format", choices=FORMATS, help="format to write, see below")
    parser.add_argument("destination", metavar="DST", help="file or directory to write; must not exist")
    return parser


if __name__ == "__main__":
    sys.exit(main())
