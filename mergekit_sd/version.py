"""The version of the package that is running."""

from importlib.metadata import version

VERSION = version("mergekit-sd")
