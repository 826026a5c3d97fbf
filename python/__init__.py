"""The Python API: checkpoints loaded, asked and trained from Python, by the engine and the checks of all else."""
