"""Images a second and peak memory of training and inference, on whatever device is here."""

import recipe

if __name__ == "__main__":
    recipe.run("benchmark")
