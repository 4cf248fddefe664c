"""Screenshots of the real TensorBoard pages of an experiment, by headless Chromium.

python scripts/screenshot_tensorboard.py runs/quickstart docs/images
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

PAGES = {"timeseries": "#timeseries", "images": "#images", "custom": "#custom_scalars"}
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--hide-scrollbars")


def main() -> None:
    logdir, out = Path(sys.argv[1]), Path(sys.argv[2])
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no chromium on the path: install it (Debian: apt-get install chromium)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1"]
    server = subprocess.Popen([*command, "--port", str(port), "--load_fast", "false"], stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}/"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}data/runs", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        time.sleep(5)  # until all runs are read
        for name, page in PAGES.items():
            picture = out / f"tensorboard-{name}.png"
            with tempfile.TemporaryDirectory() as profile:
                size = ("--window-size=1400,900", "--virtual-time-budget=30000", f"--user-data-dir={profile}")
                subprocess.run(
                    [browser, *QUIET, *OFFLINE, *size, f"--screenshot={picture.resolve()}", address + page],
                    check=True,
                    stderr=subprocess.DEVNULL,
                    timeout=180,
                )
            print(picture)
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
