"""Programs at work: compiled, captured, op by op, or all ranks in one process."""
