"""A ResNet-18 with other activations, exported to ONNX and run by another runtime."""

import pytest
import torch
import torchvision
from torch.torch_version import TorchVersion

from ap import activations

onnxruntime = pytest.importorskip("onnxruntime", reason="comes with the extra `test`")


@pytest.mark.parametrize(
    "name", ["smelu", *(pytest.param(n, marks=pytest.mark.slow) for n in ("helu", "gsmelu", "swish", "gcu", "prelu"))]
)
def test_swapped_resnet18(name, tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    assert activations.swap(model, name) == 9
    x = torch.randn(1, 3, 32, 32)
    dynamo = TorchVersion(torch.__version__) >= (2, 7)  # torch 2.6's stumbles over BatchNorm with a newer onnxscript
    torch.onnx.export(model, (x,), str(tmp_path / "model.onnx"), dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-3, atol=1e-4)
