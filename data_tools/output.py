"""What the data commands put out: files that appear whole or not at all, and counts as text."""

from pathlib import Path

from ..storage.publish import write_text
from .schema import DataError


def writable(name: str | None, flag: str) -> Path | None:
    """The path of a file to write, checked before any work is done. Raises DataError."""
    if not name:
        return None
    target = Path(name)
    if target.is_dir() or not target.parent.is_dir():
        raise DataError(f"{flag} {name}: " + ("a folder" if target.is_dir() else f"there is no folder {target.parent}"))
    return target


def save(target: Path, text: str) -> None:
    """Write a whole file or none. Raises DataError when that cannot be done."""
    try:
        write_text(target, text)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from None


def counted(number: int, what: str) -> str:
    """``1 sample``, ``2,000 samples``."""
    return f"{number:,} {what}{'s' * (number != 1)}"
