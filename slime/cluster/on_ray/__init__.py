"""How a run uses Ray: which one, with which guards, where each process is placed, and how the driver waits.

Reading order: `local_ray` (which Ray), `ray_session` (its start, with reaper and watchdog) and `own_session` (its
processes out of reach of the terminal's signals), `placement` (a place for every process), `ray_wait` (waiting for
actors) and `portable` (errors that cross from an actor to the driver).
"""
