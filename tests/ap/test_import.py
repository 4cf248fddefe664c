"""What `import ap` loads, in a fresh interpreter."""

import json
import subprocess
import sys

LOADED = """
import json, sys
import numpy, torch
before = set(sys.modules)
import ap
new = set(sys.modules) - before
print(json.dumps([sorted(new), sorted(sys.modules)]))
"""

MONITOR = """
import sys
import torch, ap
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
print(ap.measure_dnr(model, [torch.randn(4, 2)]).layers["1"].samples)
"""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


def test_it_needs_torch_and_numpy_alone_and_no_compiler():
    new, loaded = json.loads(run(LOADED))
    packages = {name.partition(".")[0] for name in new}
    assert packages - set(sys.stdlib_module_names) <= {"ap", "torch", "numpy"}
    assert not {"torch._dynamo", "torch._inductor", "triton", "pruners", "recipes"} & set(loaded)


def test_what_is_loaded_at_first_use_is_found():
    assert run(MONITOR).split() == ["4"]
