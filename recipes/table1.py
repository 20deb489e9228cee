"""Table 1: backbones x methods x targets x seeds from one command, as tables and a report."""

import recipe

if __name__ == "__main__":
    recipe.run("table1")
