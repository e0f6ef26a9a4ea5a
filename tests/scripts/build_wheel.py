"""Builds the wheel of the project in the working directory into its folder ``out``, with no network."""

from setuptools import build_meta

build_meta.build_wheel("out")
