"""The commands: flags, and the body of each recipe. Nothing imports this package."""
