"""Machine class and versions, as measurements report them."""

import os
import platform
import re
from pathlib import Path
from typing import Any, Dict

import torch
import torchvision
from _reference_models import has_fcos

import detectron2

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def environment(device: torch.device) -> Dict[str, Any]:
    """Machine class and versions; no names of hosts or paths."""
    return {
        "device": device.type,
        "machine": _processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        # The main branch still calls itself 0.6.
        "detectron2": detectron2.__version__ + (", main" if has_fcos() else ""),
    }


def _processor() -> str:
    """Such as "2 cores, Intel(R) Xeon(R) Processor, avx512_bf16, amx_bf16"."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"flags\s*:\s*(.+)", text)
    known = flags[1].split() if flags else []
    return ", ".join(
        [
            f"{os.cpu_count()} cores",
            name[1] if name else platform.machine(),
            *(flag for flag in _CPU_FLAGS if flag in known),
        ]
    )
