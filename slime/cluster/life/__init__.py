"""Life and death of a run and of its processes: how a run ends, continues and restarts, and what ends with it.

Reading order: `stop` (a signal: save, then end, with a table of the phases) and `resume_line` (the command that
continues), `restart` (again after a fault), `ending` (the closing lines). Then the guards, so that nothing hangs and
nothing is left over: `watchdog` (Ray does not answer), `stopped` (which processes are suspended), `run_files` (the
run's temporary files) and `reaper` (ends what a dead driver has left).
"""
