"""Pretrains a KerasCV ResNet with a fixed ETF classifier or with a trainable one."""

import recipe

if __name__ == "__main__":
    recipe.run("pretrain")
