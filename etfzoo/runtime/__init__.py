"""How steps run: devices, workers, one training step a backend, signals, what the machine is."""
