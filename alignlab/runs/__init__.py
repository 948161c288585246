"""The folder of a run: checkpoints, metrics, rollouts, identity, caches."""
