"""Networks: KerasCV backbones, the classifier around them, their weights and checkpoints."""
