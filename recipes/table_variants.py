"""Variants of the classifier: source, targets, collapse, calibration, strangers, in one table."""

import recipe

if __name__ == "__main__":
    recipe.run("table_variants")
