"""Rewrites of explicit programs: one file each, `Program -> Program`, typed again afterwards."""
from shardlib.passes.dead_steps import drop_dead_steps

DEFAULT = (drop_dead_steps,)
