"""The two things pyproject.toml cannot say: the ggml-python wheel of this machine, and the cffi extension."""

from setuptools import setup

from ggml_backend import requirements

setup(install_requires=requirements(), cffi_modules=["pyggml_repkv/native/build.py:ffibuilder"])
