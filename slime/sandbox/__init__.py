"""The sandbox: runs a Python program that nobody has read, and reports how it ended.

Reading order: `run` (what callers use), `launcher` (one short-lived process a run: it makes the namespaces, and holds
limits that are enforced from outside), `inside` (process 1 of the namespaces, and what the program becomes), `view`
(the files that the program sees), `system_calls` (what it may ask of the kernel), `kernel` (calls that Python lacks),
`judging` (a response's code against tests), `asserting` and `serving` (the two programs that run asserts).

docs/security.md lists what the sandbox protects from, and what it does not.
"""
