"""DeepSpeed's ZeRO is refused: each step shows an optimizer a part of the gradients. The real engine, on one process."""

import json
import sys
from pathlib import Path

import offline
import pytest

# Apart, because accelerate and transformers import it wherever it is installed.
DEEPSPEED = Path(sys.prefix) / "deepspeed"

PROGRAM = """
import json, sys
sys.path.append({folder!r})
import torch, deepspeed, deepspeed.comm.torch
import fastclip

deepspeed.comm.torch.build_shm_op = lambda: None  # compiled for half a minute, for ranks that share a machine
way, stage = {way!r}, {stage!r}
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
before = [p.detach().clone() for p in model.parameters()]
groups = [{{"params": layer.parameters()}} for layer in model]
bare = torch.optim.SGD(groups, lr=0.1)
optimizer = fastclip.ClippedOptimizer(bare, max_norm=0.1) if way == "wrapper" else bare
guard = fastclip.attach(bare, max_norm=0.1) if way == "attached" else optimizer
engine, made, _, _ = deepspeed.initialize(
    model=model,
    optimizer=optimizer,
    config={{
        "train_batch_size": 4,
        "zero_optimization": {{"stage": stage}},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }},
)
engine.backward(engine(torch.randn(4, 8)).pow(2).sum())
said = {{}}
try:
    engine.step()
except RuntimeError as error:
    said["step"] = str(error)
if way == "around":
    try:
        fastclip.ClippedOptimizer(made)
    except TypeError as error:
        said["around"] = str(error)
if hasattr(guard, "steps"):
    said["steps"], said["norm"] = int(guard.steps), None if guard.last_norm is None else float(guard.last_norm)
print("SAID " + json.dumps(said))
"""


@pytest.fixture
def said(python, tmp_path):
    """What the engine said with fastclip in, or around, its optimizer."""

    def run(way, stage):
        result = python(
            PROGRAM.format(folder=str(DEEPSPEED), way=way, stage=stage),
            **offline.ENVIRONMENT,
            **{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"},
            MASTER_PORT=str(offline.free_port()),
            TORCH_EXTENSIONS_DIR=str(tmp_path),
        )
        lines = [line for line in result.stdout.splitlines() if line.startswith("SAID ")]
        assert lines, result.stderr
        return json.loads(lines[-1].removeprefix("SAID "))

    return run


@pytest.mark.parametrize(("way", "stage"), [("wrapper", 1), ("wrapper", 3), ("attached", 2)])
def test_zero_is_refused_at_its_first_step(said, way, stage):
    found = said(way, stage)
    assert "ZeRO steps its optimizer group by group" in found["step"]
    assert "gradient_clipping" in found["step"]
    assert (found["steps"], found["norm"]) == (0, None)


def test_without_zero_the_norm_is_that_of_all_gradients(said):
    found = said("wrapper", 0)
    assert "step" not in found
    assert found["steps"] == 1
    assert found["norm"] > 0.1


def test_zeros_optimizer_cannot_be_wrapped(said):
    assert "DeepSpeedZeroOptimizer of deepspeed scales, shards and clips" in said("around", 1)["around"]
