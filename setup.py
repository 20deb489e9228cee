from setuptools import setup

setup()  # all facts are in pyproject.toml
