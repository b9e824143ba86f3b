"""Training from a script, twice in a process: `downpour.train` with a model beside the script, and
`downpour.Trainer` in another thread with one that the script defines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import commands, tiny

pytestmark = pytest.mark.ray

NET = """
from downpour.models.mlp import MnistNet

def net(seed, **arguments):
    return MnistNet(seed=seed, **arguments)
"""

SCRIPT = """
import sys, threading
import torch
import downpour
from tests.helpers import tiny

config = tiny.config(sys.argv[1], model="net:net", epochs=1, partitions=1)
folders = [downpour.train(config, runs="runs")]

class Net(torch.nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(torch.nn.Linear(64, 16, bias=False), downpour.BatchNorm(16),
                         torch.nn.ReLU(), torch.nn.Linear(16, num_classes))

class Seen:
    events = []
    def on_start(self, run): self.events.append("start")
    def on_evaluation(self, run, metrics): self.events.append("evaluation")
    def on_checkpoint(self, run, checkpoint): self.events.append("checkpoint")
    def on_end(self, run, result): self.events.append("end"); 1 / 0

def fit():
    "A network of this script, whose own weights the run begins with, and callbacks."
    trainer = downpour.Trainer(model=Net(4), loss=torch.nn.CrossEntropyLoss(), config=config,
                               arguments=None, callbacks=[Seen()])
    result = trainer.fit()
    assert isinstance(result.model()[1], torch.nn.BatchNorm1d), result.model()
    folders.append(result.path)

thread = threading.Thread(target=fit)
thread.start()
thread.join()
assert sorted(set(Seen.events)) == ["checkpoint", "end", "evaluation", "start"], Seen.events
assert Seen.events[0] == "start" and Seen.events[-1] == "end", Seen.events
events = (folders[1] / "events.jsonl").read_text()
assert "callback Seen.on_end raised ZeroDivisionError" in events, events
assert len(set(folders)) == 2, folders
try:
    downpour.resume(folders[0])
except downpour.UserError as error:
    assert "is finished" in str(error), error
else:
    raise AssertionError("a finished run was resumed")
for folder in folders:
    print(folder)
"""


@pytest.mark.timeout(480)
def test_a_script_trains_twice(tmp_path: Path) -> None:
    """The script and its model are in one folder, and it is called from another."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    (project / "net.py").write_text(NET)
    (project / "script.py").write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, project / "script.py", tiny.dataset(tmp_path / "data")],
        cwd=elsewhere,
        env={**environment, "PYTHONPATH": str(commands.ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folders = [Path(line) for line in done.stdout.splitlines() if line.startswith(str(elsewhere))]
    assert len(folders) == 2
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        assert result["exactly_once"] is True
        assert json.loads((folder / "resolved.json").read_text())["partitions"] == 1
