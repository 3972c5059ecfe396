"""The command line, one file a command: `slime COMMAND ...` or `python -m slime COMMAND ...`.

Reading order: `main` (the table of commands), `train` and `train_async` (the training loops), `plan` and `eval` (a run
that only plans, or only evaluates), `convert` and `export` (checkpoints), `plot` and `answers` (results), `demo` with
the task in `arithmetic`.

train.py, train_async.py and the tools of the same purpose under tools/ call these modules. Each has a function `main`,
which takes the words after the command.
"""
