"""Images: where they come from, how they are decoded, cropped, augmented and mixed."""
