"""Side-by-side measurements: ours and a plain implementation on the same inputs, alternately, in one process."""
