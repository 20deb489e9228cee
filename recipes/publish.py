"""Publishes a trained model: one SavedModel folder, its model card, its entry in an index."""

import recipe

if __name__ == "__main__":
    recipe.run("publish")
