"""Fine-tunes a pretrained model on another data set, or classifies by its frozen features."""

import recipe

if __name__ == "__main__":
    recipe.run("finetune")
