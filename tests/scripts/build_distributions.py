"""Builds the wheel and the source archive of the project in the working directory into ``out``, with no network."""

from setuptools import build_meta

build_meta.build_wheel("out")
build_meta.build_sdist("out")
