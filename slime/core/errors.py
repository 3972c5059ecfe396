"""Errors that end a run.

ValueError            what the user gave is wrong: flag or file, value, rule, remedy
└── UsageError        (config.parse) all problems of a command line at once, before anything starts
RuntimeError
├── RunError          a run that had started has ended: phase, process and cause
│   └── Fault         ... because a process was lost, and not because one said no: it may be started again
└── EngineError       (engine.client) an engine did not answer as asked
"""

from __future__ import annotations


class RunError(RuntimeError):
    """Its text is all that a user needs; the tracebacks are in the run's logs."""


class Fault(RunError):
    """A process died, or did not answer in time. From the last checkpoint, the same run may well succeed."""
