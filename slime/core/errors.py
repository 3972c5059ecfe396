"""The public errors of the package as one tree, each with its module if it is not defined here.

An error that the user can correct is a ValueError: it names flag or file, value, rule and remedy.

ValueError
├── UsageError (config.problem)                            all problems of a command line, before anything starts
├── DataError (config.data_rows)                           a data file, or one row of it, cannot be used
├── HookError (core.plugins)                               a hook cannot be imported or called
├── NewerFormatError (megatron.checkpoint.manifest)        a later version wrote the checkpoint; it is not damaged
├── UnsafeFileError (megatron.checkpoint.safe_pickle)      a checkpoint file has content that is not allowed
├── UnreadableFileError (megatron.checkpoint.safe_pickle)  a checkpoint file is damaged
└── UnreadError (rollout.rewards.answers.tokens)           a grader compares the answer as text only
    └── InexactError (rollout.rewards.answers.exact)       the answer has no exact value
RuntimeError
├── RunError                                               a run that had started has failed: phase, process, cause
│   ├── Fault                                              a process was lost: the run may be started again
│   └── HookFailed (core.plugins)                          a hook raised an error
├── BadStepError (megatron.nan_guard)                      a step was not taken; no weight has changed
├── EngineError (engine.connection)                        an engine or the router did not answer as it should
├── EngineFailed (engine.embedded.server)                  the embedded engine's scheduler has ended
└── NothingLeft (simulate.clock)                           a simulation waits for what can never happen
Exception
├── StopNoticed (cluster.life.stop)                        a signal has ended a wait; no error: the state is saved next
└── SandboxFault (sandbox.run)                             the sandbox failed, so there is no verdict on the program
BaseException
├── Gone (sandbox.wire)                                    the other process of a judgement has ended
└── Unsupported (sandbox.asserting)                        a test needs a value that cannot be sent to the program
"""

from __future__ import annotations


class RunError(RuntimeError):
    """A run has failed. The text is all that a user needs; the tracebacks are in the run's logs."""


class Fault(RunError):
    """A process died or did not answer in time. The same run, restarted from its last checkpoint, may well succeed."""
