"""Whether this program is a job of Ray, and whether its folder is Ray's temporary copy of the job's files.

- Used by: the rules about outputs, and the command that continues a run which a signal has ended.
- Invariant: both are properties of the driver's process, and Ray need not be imported to ask for them.

`ray job submit --working-dir DIR -- slime train ...` copies DIR into Ray's session directory and starts the program in
the copy. Without --working-dir there is no copy: the program starts in a folder that stays.
"""

from __future__ import annotations

import os
from pathlib import Path

IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""A variable that Ray sets for the program of `ray job submit`."""
PACKAGES = "working_dir_files"
"""The folder in Ray's session directory where it unpacks the working directories of jobs, each as `_ray_pkg_*`."""


def in_a_job() -> bool:
    """Return whether `ray job submit` has started this program."""
    return IN_A_JOB in os.environ


def in_a_package() -> bool:
    """Return whether the current folder is the package of a job, which Ray removes some time after the job."""
    return PACKAGES in Path.cwd().parts
