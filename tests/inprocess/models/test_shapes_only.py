"""Modules that are built for their shapes, in a process of its own."""

import subprocess
import sys


def test_our_models_need_no_compiler_for_it() -> None:
    """It is the import of the compiler that costs a second of a process's start."""
    program = """
import sys
from downpour.models import registry
from downpour.models.shapes_only import shapes_only
with shapes_only():
    for name, arguments in (("mnist", {}), ("inception", {"image_size": 32, "num_classes": 10})):
        registry.build(name, 0, batch_norm=True, **arguments)
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "False", done.stderr
