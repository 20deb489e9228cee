"""Compiles the real training step for a TPU ahead of time, on a machine without one."""

import recipe

if __name__ == "__main__":
    recipe.run("compile_check")
