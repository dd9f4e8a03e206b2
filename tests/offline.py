"""Imported by conftest.py, so before any framework: none looks for a network, or writes into the home folder."""

import os
import shutil
import socket
import tempfile
from pathlib import Path

# One for each worker: they would write into each other's settings.
HOME = Path(tempfile.gettempdir()) / f"fastclip-tests-{os.getuid()}-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HOME": str(HOME / "huggingface"),
    "KERAS_BACKEND": "torch",
    "KERAS_HOME": str(HOME / "keras"),
    "YOLO_OFFLINE": "true",
    "YOLO_CONFIG_DIR": str(HOME / "yolo"),
    "YOLO_AUTOINSTALL": "false",
    "DS_ACCELERATOR": "cpu",
}
os.environ.update(ENVIRONMENT)


def font_for_ultralytics() -> None:
    """It looks for this one whenever it reads a data set, and would download it."""
    import matplotlib

    font = HOME / "yolo" / "Ultralytics" / "Arial.ttf"
    font.parent.mkdir(parents=True, exist_ok=True)
    if not font.exists():
        shutil.copy(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", font)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def inherited() -> dict[str, str]:
    """This process's environment without what forces a backend."""
    return {name: value for name, value in os.environ.items() if not name.startswith("FASTCLIP_")}
