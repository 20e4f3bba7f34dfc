"""How many processes run side by side, and which GPU each takes, without starting CUDA.

All GPUs stay visible, in another order: so processes spread what runs on the first one alone.
"""

import glob
import os
import re
import subprocess

WORKERS = max(2, (os.cpu_count() or 2) - 2)  # two cores are for who starts them, and the driver


def visible() -> list[str]:
    """Name the GPUs that are visible here, as `CUDA_VISIBLE_DEVICES` does: none without a GPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for x in given.split(",") if (name := x.strip()) and name != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
        count = len(re.findall(r"^GPU \d+:", listed.stdout, re.MULTILINE))
    except (OSError, subprocess.CalledProcessError):
        count = len(glob.glob("/dev/nvidia[0-9]*"))
    return [str(i) for i in range(count)]


def environment(number: int, gpus: list[str]) -> dict[str, str]:
    """Return what makes one of `gpus` the first of the `number`-th process."""
    if len(gpus) < 2:
        return {}
    first = number % len(gpus)
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first:] + gpus[:first])}
