"""Published models: one SavedModel folder each, with its card, list of files and index."""
