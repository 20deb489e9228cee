"""Measures neural collapse of a model's features on a data set: NC1 to NC5, CDNV, tr(C)/p."""

import recipe

if __name__ == "__main__":
    recipe.run("neural_collapse")
