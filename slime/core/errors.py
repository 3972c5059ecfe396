"""The errors that end a run, as one tree.

ValueError the user's input is wrong: names flag or file, value, rule and remedy └── UsageError (config.rules.problem)
all problems of a command line at once, before anything starts RuntimeError ├── RunError a run that had started has
failed: names phase, process and cause │ └── Fault ... because a process was lost, not because of an error: the run may
be started again └── EngineError (engine.connection) an engine did not answer as the request requires
"""

from __future__ import annotations


class RunError(RuntimeError):
    """A run has failed. The text is all that a user needs; the tracebacks are in the run's logs."""


class Fault(RunError):
    """A process died or did not answer in time. The same run, restarted from its last checkpoint, may well succeed."""
