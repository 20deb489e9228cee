"""Asks a TF Serving server what is on images, and measures how fast it answers."""

import recipe

if __name__ == "__main__":
    recipe.run("serve_client")
