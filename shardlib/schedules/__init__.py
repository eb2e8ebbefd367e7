"""Schedules of pipelines: which rank does what of which microbatch, in which order. They are data.

`schedule` says what one is, `generators` makes the known ones, `waits` proves that one ends, `clock` runs it
on a clock, and `timeline` draws that.
"""
