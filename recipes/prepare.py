"""Makes the data set `tiny_imagenet` from the public archive of Tiny ImageNet, which TFDS lacks."""

import recipe

if __name__ == "__main__":
    recipe.run("prepare")
