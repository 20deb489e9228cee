"""Says what is on images: the five likeliest classes, with a model of the zoo or of yours."""

import recipe

if __name__ == "__main__":
    recipe.run("predict")
