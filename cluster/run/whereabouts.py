"""Where the paths of a run's configuration lead to, from wherever a command is given.

A configuration keeps a path as it was given. A relative one was meant from the folder that the run
began in, which `data.json` names.
"""

from __future__ import annotations

from pathlib import Path

from downpour.shuffler.dataset.names import OWN_DATA


def found_again(path: str, run: Path, began_in: str | None) -> str:
    """Return what a path of a run's configuration means here.

    A relative path is looked for where the run began; in the working directory, for a run from
    before that was noted, or one that was moved to another machine with its data; and then in the
    folders that the run's folder is in, from the innermost.

    Args:
        path: as it was given: absolute, relative or a URI.
        run: the run's folder, absolute.
        began_in: the folder that the run began in; None if it is not known.

    Returns:
        The path itself if it is absolute or a URI. Otherwise the first of these that exists, and if
        none does, where it was, for the message about what is missing.
    """
    if "://" in path or path.startswith(OWN_DATA) or Path(path).is_absolute():
        return path
    first = Path(began_in) if began_in else Path.cwd()
    for folder in (first, Path.cwd(), *run.parents):
        if (folder / path).exists():
            return str(folder / path)
    return str(first / path)
