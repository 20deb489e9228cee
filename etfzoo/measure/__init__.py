"""What a trained network does: accuracy, features, neural collapse."""
