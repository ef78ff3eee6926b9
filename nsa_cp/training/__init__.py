"""The trainer: configuration, data, loop, checkpoints, evaluation and pictures. Import what you need from its modules."""
