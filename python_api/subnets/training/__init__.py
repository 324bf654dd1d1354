"""Training loops that the experiments share: random streams, many small networks side by side, run folders."""
