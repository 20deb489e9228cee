"""Evaluates a model: top-1, top-5, mean per-class accuracy, accuracy by class, confusion matrix."""

import recipe

if __name__ == "__main__":
    recipe.run("evaluate")
