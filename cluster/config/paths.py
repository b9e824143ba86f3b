"""The folders of this installation, found from the package, not from the environment."""

from __future__ import annotations

from pathlib import Path

import downpour

PACKAGE = Path(downpour.__file__).parent
"""The folder of the package `downpour`. In a checkout its parts are links to the root's folders."""

ROOT = PACKAGE.parent
"""What has to be on a Python's path for `import downpour`: a checkout, or site-packages."""


def checkout() -> Path | None:
    """The root of the checkout that this is, or None if Downpour is installed from a wheel."""
    return ROOT if (PACKAGE / "cluster").is_symlink() else None
