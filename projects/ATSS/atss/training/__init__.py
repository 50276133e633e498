"""Training runs: command line, launching processes, configs, the loop."""
