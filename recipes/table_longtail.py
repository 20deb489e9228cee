"""Long tails: methods x imbalances x seeds from one command, by the size of the classes."""

import recipe

if __name__ == "__main__":
    recipe.run("table_longtail")
