"""Code of somebody else's: importing it by its name, and where in it an error came from.

Not here: what is looked for in a module (`registry`).
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

MISSING_OPERATOR = re.compile(r"operator torchvision::(\w+) does not exist")
OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
"""What torchvision registers kernels' shapes for while it is imported, whether or not its compiled
operators could be loaded."""

PACKAGE = Path(__file__).absolute().parents[1]
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
INSTALLED = {"site-packages", "dist-packages"}
"""Folders that installed packages are in."""

_declared: list[object] = []
"""Libraries of PyTorch's that hold the declarations; they end with the process."""


def import_named(name: str) -> ModuleType:
    """Import the module called `name`.

    torchvision's wheel from PyPI is compiled against PyTorch's CUDA build. Beside the build for
    processors its operators are not loaded, and the import ends with "operator torchvision::nms
    does not exist", although only networks for detection use them. On exactly that failure the
    operators are declared without kernels, so that the others can be imported. A network that calls
    one is told so by PyTorch.

    Raises:
        Exception: whatever importing it raises.
    """
    for _ in OPERATORS:
        before = set(sys.modules)
        try:
            return importlib.import_module(name)
        except RuntimeError as error:
            found = MISSING_OPERATOR.search(str(error))
            if found is None or not _declare(found[1]):
                raise
            # What was imported on the way holds halves of the rest.
            for module in set(sys.modules) - before:
                if module.split(".")[0] == "torchvision":
                    del sys.modules[module]
    return importlib.import_module(name)


def _declare(operator: str) -> bool:
    """Declare an operator of torchvision's; returns whether it is one that is known here."""
    import torch

    schema = OPERATORS.get(operator)
    if schema is None or hasattr(torch.ops.torchvision, operator):
        return False
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(f"{operator}{schema}")
    if not _declared:
        log.warning(
            "torchvision's compiled operators do not load beside PyTorch %s: networks that need "
            "them (for detection) do not run, the others do",
            torch.__version__,
        )
    _declared.append(library)
    return True


def place_of(error: BaseException) -> str | None:
    """Where the user's own code raised an error, as `file:line`; None if it was not there.

    That is the innermost frame outside this package, Python's library and installed packages.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_users(frame.filename):
            return f"{frame.filename}:{frame.lineno}"
    return None


def is_users(file: str) -> bool:
    """Whether a source is the user's own: not this package, not Python's, nothing installed."""
    path = Path(file).absolute()
    if file.startswith("<") or not INSTALLED.isdisjoint(path.parts):
        return False
    return not any(path.is_relative_to(folder) for folder in (PACKAGE, STANDARD_LIBRARY))
