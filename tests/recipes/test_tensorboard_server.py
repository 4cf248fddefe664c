"""What a real TensorBoard server on the loopback address shows of a real, small experiment."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from recipes.cli import main


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    out = tmp_path_factory.mktemp("tensorboard") / "run"
    options = ["--cycles", "1", "--epochs", "1", "--seeds", "1", "--ap", "lite", "--monitor-every", "5"]
    assert main(["run", "quickstart", *options, "--out", str(out), "--quiet"]) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(out), "--port", str(port), "--bind_all=false"]
    command = [*command[:-1], "--host", "127.0.0.1", "--load_fast", "false", "--reload_interval", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: get(address, "data/runs"))
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def get(address, path):
    try:
        with urllib.request.urlopen(f"{address}/{path}", timeout=10) as answer:
            return json.load(answer)
    except (urllib.error.URLError, ConnectionError):
        return None


def wait_for(condition, patience=120.0):
    end = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


@pytest.mark.slow  # the server takes its time to start
def test_scalars_pictures_layout_and_hparams_come_back_over_http(server):
    scalars = wait_for(lambda: get(server, "data/plugin/scalars/tags"))["lite-seed0/tensorboard"]
    assert {"dnr/train/model/total", "dnr/train/model/dynamic", "dnr/eval/model/static", "trained/accuracy"} <= set(
        scalars
    )
    assert any(tag.startswith("dnr/train/") and "/model/" not in tag for tag in scalars)
    images = get(server, "data/plugin/images/tags")["lite-seed0/tensorboard"]
    assert images
    layout = get(server, "data/plugin/custom_scalars/layout")
    assert layout["category"]
    runs = get(server, "data/runs")
    assert any("hparams" in run for run in runs)
