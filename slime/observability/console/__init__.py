"""The console of a run: what it shows in a terminal, prints into a plain log, and copies into logs/driver.log.

Read `run_console` first: the driver's interface. `view` is the state that is shown, with its estimates of time left.
`live` draws it in a terminal. `lines` makes the lines that stay: one for a rollout, one for an evaluation. `hints`
notices that a run learns nothing. `text` has bars, sparklines, and numbers with a fixed number of digits.
"""
