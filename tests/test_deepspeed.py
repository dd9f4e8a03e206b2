"""DeepSpeed's ZeRO is refused: each of its steps shows a part of the gradients. The real engine, on one process."""

import json
import subprocess
import sys
from pathlib import Path

import offline
import pytest
import torch

import fastclip

# Apart, because accelerate and transformers import it wherever it is installed.
DEEPSPEED = Path(sys.prefix) / "deepspeed"
CASES = [("wrapper", 0), ("wrapper", 1), ("attached", 2), ("wrapper", 3), ("around", 1)]

PROGRAM = """
import json, sys
sys.path.append(sys.argv[1])
import torch, deepspeed
import fastclip

# It tries out which of its operators compile here, and compiles one: a minute's work for what one process doesn't use.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
found = []
for way, stage in json.loads(sys.argv[2]):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    bare = torch.optim.SGD([{"params": layer.parameters()} for layer in model], lr=0.1)
    optimizer = fastclip.ClippedOptimizer(bare, max_norm=0.1) if way == "wrapper" else bare
    guard = fastclip.attach(bare, max_norm=0.1) if way == "attached" else optimizer
    config = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    config |= {"train_batch_size": 4, "gradient_clipping": 0.0}
    engine, made, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    said = {}
    try:
        if way == "around":
            fastclip.ClippedOptimizer(made)
        engine.backward(engine(torch.randn(4, 8)).pow(2).sum())
        engine.step()
    except (RuntimeError, TypeError) as error:
        said["error"] = str(error)
    if way != "around":
        said["steps"], said["norm"] = int(guard.steps), None if guard.last_norm is None else float(guard.last_norm)
    found.append(said)
print("SAID " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What became of the first step, for each of the cases; importing DeepSpeed takes longer than all of them."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment = offline.ENVIRONMENT | alone | {"MASTER_PORT": str(offline.free_port())}
    environment["PYTHONPATH"] = str(Path(fastclip.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(DEEPSPEED), json.dumps(CASES)],
        capture_output=True,
        text=True,
        env=offline.inherited() | environment | {"TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("extensions"))},
        timeout=250,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("SAID ")]
    assert lines, result.stderr
    return dict(zip(CASES, json.loads(lines[-1].removeprefix("SAID ")), strict=True))


@pytest.mark.parametrize("case", [("wrapper", 1), ("attached", 2), ("wrapper", 3)], ids=repr)
def test_zero_is_refused_at_its_first_step(said, case):
    assert "ZeRO steps its optimizer group by group" in said[case]["error"]
    assert "set gradient_clipping in its own configuration" in said[case]["error"]
    assert (said[case]["steps"], said[case]["norm"]) == (0, None)


def test_without_zero_the_norm_is_that_of_all_gradients(said):
    found = said["wrapper", 0]
    assert "error" not in found
    assert found["steps"] == 1
    assert found["norm"] > 0.1


def test_zeros_optimizer_cannot_be_wrapped(said):
    assert "DeepSpeedZeroOptimizer of deepspeed scales, shards and clips" in said["around", 1]["error"]


def test_the_functions_say_where_its_gradients_are() -> None:
    """A parameter of ZeRO has none of its own; the engine keeps them, and marks its parameters."""
    p = torch.nn.Parameter(torch.ones(2))
    p.ds_id = 0  # as ZeRO-3 does
    with pytest.raises(TypeError, match="gradient_clipping"):
        fastclip.clip_grad_norm_([p], 1.0)
