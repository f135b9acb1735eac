"""Packaging of Muster. Exact tested versions are in constraints.txt; these are lower bounds."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
# A run directory may be gs://BUCKET/PATH; google-crc32c comes with gcsfs, and is imported as well.
GCS = ["gcsfs>=2026.1.0", "google-crc32c>=1.6.0"]

setup(
    name="muster",
    version="0.1.0",
    description="Start one JAX training program on many machines, and keep it alive.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["launch*", "trainer*", "configs*"]),
    package_data={"launch": ["hook/*.py"]},
    install_requires=[
        "jax>=0.10.0",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "absl-py>=2.3.0",
        "ml-collections>=1.1.0",
        "array-record>=0.8.0",
        "tensorboardX>=2.6.4",
        "xxhash>=3.5.0",
    ],
    extras_require={
        "tpu": ["jax[tpu]", *GCS],
        "plan": ["jax[tpu]"],  # The compiler alone, for `muster plan` where there is no TPU.
        "cuda": ["jax[cuda13]"],
        "export": ["safetensors>=0.7.0"],  # For `muster checkpoints RUN export`.
        "test": [
            "pytest>=8.4",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff",
            "mypy",
            "scikit-learn>=1.8",  # configs/digits.py trains on its digits.
            "torch>=2.13.0",
            "safetensors>=0.7.0",
            "jax[tpu]",  # tests/plan compile for TPUs.
            *GCS,
        ],
    },
    entry_points={"console_scripts": ["muster=launch.main:console"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
