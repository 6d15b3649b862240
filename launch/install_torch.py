"""Install the PyTorch build that fits this computer: `python launch/install_torch.py`. No dependencies.

With an NVIDIA GPU, and outside Linux, the package index's own build is the right one. On Linux without a
GPU that build would bring gigabytes of CUDA libraries, so a CPU build is looked for first.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

CPU_BUILD = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def has_nvidia_gpu() -> bool:
    """Whether the driver lists at least one GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60).returncode == 0


def attempts() -> list[list[str]]:
    """Arguments of `pip install`, to be tried in this order until one succeeds."""
    if sys.platform != "linux" or has_nvidia_gpu():
        return [["torch>=2.11"]]
    return [
        ["--no-index", "--no-deps", CPU_BUILD],  # a local wheel folder in pip's configuration: no network
        ["--index-url", CPU_INDEX, "--timeout", "10", "--retries", "1", "--no-deps", CPU_BUILD],
        [CPU_BUILD],
    ]


def main() -> int:
    """Return pip's exit status: 0 once PyTorch is installed."""
    if importlib.util.find_spec("torch") is not None:
        return 0
    print("Installing PyTorch (a few minutes the first time) ...", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    *first_choices, last = attempts()
    for arguments in first_choices:
        if subprocess.run([*pip, *arguments], capture_output=True).returncode == 0:
            return 0
    return subprocess.run([*pip, *last]).returncode


if __name__ == "__main__":
    sys.exit(main())
