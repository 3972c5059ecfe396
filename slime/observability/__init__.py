"""Everything that a person sees of a run: metrics, trackers, console lines, logs, and files for debugging.

Read in this order: `run_directory` (what a run writes, and its lock), `metrics_log` (metrics.jsonl), `trackers` (W&B,
TensorBoard), `console` (lines and the live view), `progress` (its counts), `phases` (wall time by phase), `step_files`
(--save-debug-train-data).
"""
