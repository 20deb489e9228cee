"""The paper's Figure 2: ridge regression on random features, against a2 of a2 t^2 + t."""

import recipe

if __name__ == "__main__":
    recipe.run("figure2")
