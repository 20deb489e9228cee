"""Makes the data set `tiny_imagenet` from its public archive, or one that is read by index."""

import recipe

if __name__ == "__main__":
    recipe.run("prepare")
