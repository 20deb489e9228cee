"""The paper's Figure 3: the covariance within classes of several models' features on a target."""

import recipe

if __name__ == "__main__":
    recipe.run("figure3")
